//! Events that are no vCPU's request: accesses of devices, and pages that came when they were touched.

use super::event::{Asked, ByDevice, Done, Kind, NO_VCPU, Outcome, RecordedDecision, Verdict};
use super::log::EventLog;
use crate::clock::monotonic;
use crate::memory::address::State;
use crate::memory::missing::Came;
use crate::policy::decision::Decision;
use crate::policy::device_access::DeviceAccess;

impl EventLog {
    /// Adds the event of a device's access to shared pages, which nobody converts before this returns.
    pub(crate) fn device_access(&self, by: &ByDevice, gpa: u64, size: u64) {
        let nothing = RecordedDecision::none(State::Shared);
        self.by_device(by, (gpa, size), State::Shared, &nothing, (Outcome::Accessed, 0));
    }

    /// Adds the event of a device's access to what is not shared, and what the policy decided, unless it failed.
    pub(crate) fn refused_access(&self, access: &DeviceAccess, decision: Option<&Decision>) {
        let by = ByDevice {
            number: access.number,
            queue: access.queue,
            descriptor: access.descriptor,
            write: access.write,
        };
        let (recorded, outcome, errno) = match decision {
            Some(Decision::Deny(errno)) => (RecordedDecision::deny(State::Shared, *errno), Outcome::Denied, errno.0),
            Some(_) => {
                let stop = RecordedDecision {
                    verdict: Verdict::Stop,
                    ..RecordedDecision::none(State::Shared)
                };
                (stop, Outcome::Stopped, 0)
            }
            None => (RecordedDecision::none(State::Shared), Outcome::Failed, 0),
        };
        let bytes = (access.gpa, access.size);
        self.by_device(&by, bytes, access.state, &recorded, (outcome, errno));
    }

    fn by_device(
        &self,
        by: &ByDevice,
        (gpa, size): (u64, u64),
        state: State,
        decision: &RecordedDecision,
        (outcome, errno): (Outcome, i32),
    ) {
        let asked = Asked {
            time: monotonic(),
            kind: Kind::Device,
            gpa,
            size,
            to: State::Shared,
            state: Some(state),
            page_size: 0,
            raw: 0,
            flags: 0,
            rip: 0,
            repeats: 0,
        };
        self.publish_other(NO_VCPU, (&asked, 0), |writer| {
            writer.by_device(by);
            writer.decided(decision);
            writer.ended_with_nothing(outcome, errno);
        });
    }

    /// Adds the event of a missing page that was touched, once the pager has answered, or failed.
    pub(crate) fn missing_page(&self, came: &Came) {
        let asked = Asked {
            time: came.time,
            kind: Kind::Missing,
            gpa: came.gpa,
            size: came.bytes,
            to: came.state,
            state: Some(came.state),
            page_size: 0,
            raw: 0,
            flags: 0,
            rip: 0,
            repeats: 0,
        };
        let vcpu = came.by.vcpu().unwrap_or(NO_VCPU);
        let outcome = if came.failed { Outcome::Failed } else { Outcome::Came };
        self.publish_other(vcpu, (&asked, came.nanoseconds), |writer| {
            writer.decided(&RecordedDecision::none(came.state));
            writer.ended(outcome, 0, &Done::nothing(came.gpa, came.state));
        });
    }
}
