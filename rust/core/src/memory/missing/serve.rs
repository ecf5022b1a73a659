//! The thread that puts missing pages where they belong. It is the only one that asks the pager.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags, poll};

use super::pager::{By, Given, Wanted};
use super::{Came, Missing, Over};
use crate::clock::monotonic;
use crate::errno::Errno;
use crate::error::{Error, Failure};
use crate::hypervisor::raw;
use crate::hypervisor::userfault::Touch;
use crate::memory::address::{BLOCK, PAGE_SIZE, Range, State};

/// What came of a page.
enum Asked {
    /// It is there.
    Put,
    /// It was there already, or is to be zeroes: it was discarded.
    NotMissing,
    /// No page comes any more, and who sleeps is woken.
    Over,
    /// In a child that was forked, with which this thread ends.
    Forked,
}

impl Wanted {
    /// What is noted of it.
    fn came(&self, bytes: u64, time: u64, failed: bool) -> Came {
        Came {
            gpa: self.page.gpa(),
            state: self.state,
            by: self.by,
            time,
            bytes,
            nanoseconds: monotonic().saturating_sub(time),
            failed,
        }
    }
}

impl Missing {
    /// Until no page is missing any more, or none comes any more.
    pub(crate) fn serve(&self) {
        let mut bytes = Vec::new();
        while self.inner.lock().over.is_none() {
            let wake = raw::borrowed(&self.wake);
            let mut ready = [
                PollFd::new(&self.userfault, PollFlags::IN),
                PollFd::from_borrowed_fd(wake, PollFlags::IN),
            ];
            // EINTR looks again, as everything else does.
            let _ = poll(&mut ready, None);
            if !ready[1].revents().is_empty() {
                let _ = self.wake.read();
                if self.serve_asks(&mut bytes).is_break() {
                    return;
                }
            }
            // The next one is told of by another poll, which costs no more than to find that there is none.
            if self.inner.lock().over.is_none()
                && let Some(touch) = self.userfault.next()
                && self.serve_touch(touch, &mut bytes).is_break()
            {
                return;
            }
            if !self.inner.lock().any_is_missing() {
                // From now on what is not there is zeroes, and nobody has to be asked.
                self.end_because(Over::AllCame);
            }
        }
    }

    fn serve_asks(&self, bytes: &mut Vec<u8>) -> ControlFlow<()> {
        loop {
            let mut inner = self.inner.lock();
            let Some(ask) = inner.asks.pop_front().filter(|_| inner.over.is_none()) else {
                return ControlFlow::Continue(());
            };
            drop(inner);
            match self.ask(ask.state, ask.gpa, ask.by, bytes) {
                Ok(Asked::Forked) => return ControlFlow::Break(()),
                Ok(_) => {}
                Err(error) => {
                    *ask.failure.lock() = Some(error);
                    self.changed.notify_all();
                }
            }
        }
    }

    fn serve_touch(&self, touch: Touch, bytes: &mut Vec<u8>) -> ControlFlow<()> {
        let side = |state| {
            let gpa = self.side(state).mapping.offset_of(touch.address)?;
            Some((state, gpa - gpa % PAGE_SIZE))
        };
        let Some((state, gpa)) = [State::Shared, State::Private].into_iter().find_map(side) else {
            return ControlFlow::Continue(());
        };
        if self.inner.lock().unanswered.contains(&(state, gpa)) {
            return ControlFlow::Continue(());
        }
        let vcpu = (self.surroundings.vcpu)(touch.thread);
        let by = vcpu.map_or(By::Kvm, By::Vcpu);
        match self.ask(state, gpa, by, bytes) {
            Ok(Asked::Put | Asked::Over) => {}
            Ok(Asked::Forked) => return ControlFlow::Break(()),
            Ok(Asked::NotMissing) => self.put_zeroes(state, gpa),
            Err(error) => self.failed(state, gpa, error),
        }
        ControlFlow::Continue(())
    }

    /// Asks for a page and puts it there, with what else came.
    fn ask(&self, state: State, gpa: u64, by: By, bytes: &mut Vec<u8>) -> Result<Asked, Error> {
        let (page, block) = match (Range::new(gpa, PAGE_SIZE), Range::new(gpa - gpa % BLOCK, BLOCK)) {
            (Some(page), Some(block)) => (page, block),
            _ => return Ok(Asked::NotMissing),
        };
        let mut inner = self.inner.lock();
        let Some(around) = inner.pages[state as usize].run_around(gpa, block) else {
            return Ok(Asked::NotMissing);
        };
        inner.asked = Some(gpa);
        drop(inner);
        let wanted = Wanted {
            page,
            around,
            state,
            by,
        };
        let pager = self.pager.lock().clone();
        let begun = monotonic();
        let given = self.inside(|| pager.missing(&wanted, bytes));
        let found = match given {
            Ok(Given::Forked) => return Ok(Asked::Forked),
            Ok(Given::Bytes(pages)) => Ok((pages, bytes.len() as u64, bytes.as_ptr())),
            Ok(Given::Mapped(pages, mapping)) => {
                let from = mapping.address(pages.gpa()).get() as *const u8;
                Ok((pages, pages.size(), from))
            }
            Err(failure) => Err(failure),
        };
        let answered = found.and_then(|(pages, len, from)| {
            let fits = pages.intersect(&around) == Some(pages) && pages.contains(gpa);
            match fits && len == pages.size() {
                true => Ok((pages, from)),
                false => Err(Failure::from(format!(
                    "it answered with {len:#x} bytes for {pages}, and was asked for {page}, or pages around it of {around}"
                ))),
            }
        });
        // The pager, whose mapping this may be, and the buffer are there until it is done.
        let put = answered.and_then(|(pages, from)| self.put(&wanted, pages, from, begun));
        self.inner.lock().asked = None;
        self.changed.notify_all();
        put.map_err(|failure| {
            (self.surroundings.note)(&wanted.came(PAGE_SIZE, begun, true));
            Error::Pager {
                gpa,
                by: by.to_string(),
                vcpu: by.vcpu(),
                failure,
            }
        })
    }

    /// Puts those of the pages there that are missing still: others were discarded meanwhile. `from`: their bytes.
    fn put(&self, wanted: &Wanted, pages: Range, from: *const u8, begun: u64) -> Result<Asked, Failure> {
        let side = self.side(wanted.state);
        // Locked, so that a page is not discarded between the look at it and here.
        let mut inner = self.inner.lock();
        if inner.over.is_some() {
            return Ok(Asked::Over);
        }
        let mut at = pages.gpa();
        let (mut put, mut is_there, mut failure) = (0, false, None);
        while let Some(rest) = Range::new(at, pages.end() - at)
            && let Some(first) = inner.pages[wanted.state as usize].first_in(rest)
            && let Some(run) = inner.pages[wanted.state as usize].run_around(first, rest)
        {
            let from = from.wrapping_add((run.gpa() - pages.gpa()) as usize);
            let (len, copied) = self.userfault.copy(side.mapping.address(run.gpa()), from, run.size());
            if let Some(done) = Range::new(run.gpa(), len) {
                side.touched.add(done.gpa(), len as usize);
                inner.pages[wanted.state as usize].remove(done);
                put += len;
                is_there |= done.contains(wanted.page.gpa());
            }
            if let Err(errno) = copied {
                failure = Some(not_put(run, errno));
                break;
            }
            at = run.end();
        }
        self.any.store(inner.any_is_missing(), Ordering::Release);
        // Before anybody goes on who waits, so that they find it.
        if failure.is_none() {
            let came = wanted.came(put, begun, false);
            (self.surroundings.note)(&came);
            inner.note(came);
        }
        drop(inner);
        self.changed.notify_all();
        match failure {
            Some(failure) => Err(failure),
            None if is_there => Ok(Asked::Put),
            None => Ok(Asked::NotMissing),
        }
    }

    /// Wakes who touched a page that is zeroes, or there.
    fn put_zeroes(&self, state: State, gpa: u64) {
        let side = self.side(state);
        let at = side.mapping.address(gpa);
        let put = self.userfault.zero(at, PAGE_SIZE);
        side.touched.add(gpa, PAGE_SIZE as usize);
        if put.is_err() {
            // It is there, or this is watched no more.
            let _ = self.userfault.wake(at, PAGE_SIZE);
        }
    }

    /// Who touched it sleeps on. That is a vCPU, which leaves KVM_RUN when the run ends, or KVM in between.
    fn failed(&self, state: State, gpa: u64, error: Error) {
        self.inner.lock().unanswered.push((state, gpa));
        let by_vcpu = matches!(error, Error::Pager { vcpu: Some(_), .. });
        match (self.surroundings.end)(error) {
            // One that has left touches it again in the next run.
            Err(_) if by_vcpu => {}
            Err(error) => self.lose(&error.to_string()),
            Ok(()) => {}
        }
    }
}

fn not_put(pages: Range, errno: Errno) -> Failure {
    format!("{pages} could not be put into the guest's memory: {errno}").into()
}
