//! What is in a snapshot's folder, and what the machine was made with.

use std::sync::Arc;

use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};

use crate::devices::serial::SavedSerial;
use crate::devices::virtio::saved::SavedDevice;
use crate::error::Error;
use crate::hypervisor::host::EnforcementMode;
use crate::hypervisor::vm::Controllers;
use crate::machine::config::{Confidential, Config, Platform};
use crate::memory::address::State;
use crate::memory::views::Views;
use crate::policy::hooks::Policy;
use crate::policy::knowledge::Knowledge;
use crate::vcpu::saved::SavedVcpu;

/// Another number after each change that an older pagegate could not read.
pub(super) const FORMAT: u32 = 1;

/// The files.
pub(super) mod name {
    pub const MANIFEST: &str = "manifest.json";
    pub const STATE: &str = "state.json";
    pub const SHARED: &str = "shared.memory";
    pub const PRIVATE: &str = "private.memory";
    pub const PAGES: &str = "private.pages";
    pub const KERNEL: &str = "kernel";
}

/// The first file that is read: which format it is, how the machine was made, and the sums of the others.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Manifest {
    pub format: u32,
    /// The version of pagegate that wrote it.
    pub pagegate: String,
    pub machine: Made,
    /// XXH3 (64 bits) of each file's bytes; of memory, of each page that is not all zeroes after its gpa.
    pub sums: Sums,
}

#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Sums {
    pub state: u64,
    pub pages: u64,
    pub shared: u64,
    pub private: u64,
    /// If a kernel was booted.
    pub kernel: Option<u64>,
}

/// What of the parameters a guest can tell.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(in crate::machine) struct Made {
    memory: u64,
    vcpus: u32,
    enforcement: String,
    /// The bit of a guest-physical address that selects the shared view, or the private one.
    shared_bit: Option<u32>,
    private_bit: Option<u32>,
    initial: String,
    platform: String,
    confidential: Option<String>,
    memslots: u32,
}

/// Everything but memory.
#[derive(Deserialize, Serialize)]
pub(super) struct Saved {
    pub vcpus: Vec<SavedVcpu>,
    pub clock: kvm_clock_data,
    pub pc: Option<SavedPc>,
    /// A conversion has kept its old side.
    pub kept: bool,
    /// What the policies know that ask others, the first of them first.
    #[serde(default)]
    pub policy: Vec<Option<Knowledge>>,
}

/// What is around the vCPUs of a PC.
#[derive(Deserialize, Serialize)]
pub(in crate::machine) struct SavedPc {
    pub controllers: Controllers,
    pub serial: SavedSerial,
    pub pci_address: u32,
    pub devices: Vec<SavedDevice>,
}

const BARE: &str = "bare";
const PC: &str = "pc";
const SEV: &str = "sev";

impl Made {
    pub(in crate::machine) fn of(config: &Config, mode: EnforcementMode, views: &Views) -> Self {
        Self {
            memory: config.memory,
            vcpus: config.vcpus,
            enforcement: mode.as_str().to_owned(),
            shared_bit: views.bit_of(State::Shared),
            private_bit: views.bit_of(State::Private),
            initial: config.initial.as_str().to_owned(),
            platform: match config.platform {
                Platform::Bare => BARE,
                Platform::Pc => PC,
            }
            .to_owned(),
            confidential: config.confidential.map(|Confidential::Sev| SEV.to_owned()),
            memslots: config.memslots,
        }
    }

    /// The parameters of the machine that goes on from it.
    pub(super) fn config(&self, policy: Arc<dyn Policy>) -> Result<Config, Error> {
        let unknown =
            |what: &str, value: &str| Error::NotSupported(format!("its {what} is {value:?}, which is not known"));
        let enforcement = EnforcementMode::ALL
            .into_iter()
            .find(|mode| mode.as_str() == self.enforcement);
        let states = [State::Shared, State::Private];
        let initial = states.into_iter().find(|state| state.as_str() == self.initial);
        Ok(Config {
            vcpus: self.vcpus,
            enforcement: Some(enforcement.ok_or_else(|| unknown("enforcement", &self.enforcement))?),
            shared_bit: self.shared_bit,
            private_bit: self.private_bit,
            initial: initial.ok_or_else(|| unknown("initial state", &self.initial))?,
            platform: match self.platform.as_str() {
                BARE => Platform::Bare,
                PC => Platform::Pc,
                other => return Err(unknown("platform", other)),
            },
            confidential: match self.confidential.as_deref() {
                None => None,
                Some(SEV) => Some(Confidential::Sev),
                Some(other) => return Err(unknown("confidential", other)),
            },
            memslots: self.memslots,
            ..Config::new(self.memory, policy)
        })
    }
}
