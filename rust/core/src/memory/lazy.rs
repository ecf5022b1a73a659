//! Guest memory of which some pages are missing.

use std::sync::Arc;

use super::address::{Range, State};
use super::backing::BackingKind;
use super::guest_memory::GuestMemory;
use super::missing::pager::Pager;
use super::missing::{Missing, PageBits, Surroundings};
use crate::error::Error;
use crate::input::Watch;

impl GuestMemory {
    /// From now on these pages, by state, come when they are touched. Of memory whose vCPUs have not run. What is returned
    /// is to be served, by a thread of its own.
    ///
    /// # Errors
    /// As [`Missing::new`]; `Busy` for memory that has a pager.
    pub(crate) fn begin_missing(
        &self,
        pages: [PageBits; 2],
        pager: Arc<dyn Pager>,
        surroundings: Surroundings,
    ) -> Result<Arc<Missing>, Error> {
        if self.sides.private.kind() != BackingKind::Memfd {
            return Err(Error::NotSupported(
                "the private pages are in a guest_memfd, whose pages cannot come when they are touched: use \
                 enforcement=\"traps\" or \"memslots\""
                    .to_owned(),
            ));
        }
        let sides = [self.sides.shared.side(), self.sides.private.side()];
        let missing = Arc::new(Missing::new(sides, pages, pager, surroundings)?);
        if self.missing.set(missing.clone()).is_err() {
            return Err(Error::Busy("this machine has a pager already"));
        }
        for state in [State::Shared, State::Private] {
            self.sides.of(state).set_missing(&missing, state);
        }
        // So that no conversion takes the short way, which does not look for missing pages.
        self.listeners.never_empty();
        Ok(missing)
    }

    /// Frees all of memory, on both sides; these pages are missing then, and all others zeroes. The caller holds all pages:
    /// whoever writes meanwhile would leave bytes where a page is missing.
    ///
    /// # Errors
    /// As [`Missing::begin_again`]; `Host` where freeing memory fails.
    pub(crate) fn begin_again(
        &self,
        missing: &Missing,
        pages: [PageBits; 2],
        pager: Arc<dyn Pager>,
    ) -> Result<(), Error> {
        self.discard_all(State::Shared)?;
        self.discard_all(State::Private)?;
        missing.begin_again(pages, pager)
    }

    /// All pages, by the state that they are in.
    ///
    /// # Errors
    /// `Host` without memory for the list.
    pub(crate) fn all_pages(&self) -> Result<[PageBits; 2], Error> {
        let what = "list the guest's missing pages";
        let failed = |errno| Error::Host { what, errno };
        let end = self.views().memory_end();
        let mut pages = [PageBits::new(end).map_err(failed)?, PageBits::new(end).map_err(failed)?];
        for run in self.runs().map_err(failed)? {
            pages[run.state as usize].insert(run.range);
        }
        Ok(pages)
    }

    /// Its missing pages, if it ever had any.
    pub(crate) fn missing(&self) -> Option<&Arc<Missing>> {
        self.missing.get()
    }

    /// Waits until none of these pages is missing, on either side.
    ///
    /// # Errors
    /// As [`Missing::bring`].
    pub(crate) fn bring(&self, range: Range, watch: &mut Watch<'_>) -> Result<(), Error> {
        let Some(missing) = self.missing() else {
            return Ok(());
        };
        missing.bring(State::Shared, range, watch)?;
        missing.bring(State::Private, range, watch)
    }

    /// The same of all of memory.
    ///
    /// # Errors
    /// As [`Missing::bring`].
    pub(crate) fn bring_all(&self, watch: &mut Watch<'_>) -> Result<(), Error> {
        self.all().map_or(Ok(()), |all| self.bring(all, watch))
    }

    /// Has those touch their pages again for which the pager failed, before a run.
    ///
    /// # Errors
    /// `Pager` if no page comes any more.
    pub(crate) fn ask_again(&self) -> Result<(), Error> {
        self.missing().map_or(Ok(()), |missing| missing.ask_again())
    }

    /// No missing page comes any more, and nobody waits for one.
    pub(crate) fn end_missing(&self) {
        if let Some(missing) = self.missing() {
            missing.end();
        }
    }
}
