//! A snapshot whose state was tampered with, and whose checksums were made to fit: it is refused or resumed, and never ends
//! the process.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pagegate_core::devices::console::Console;
use pagegate_core::devices::virtio::console::VirtioConsole;
use pagegate_core::devices::virtio::rng::Rng;
use pagegate_core::error::Error;
use pagegate_core::hypervisor::fake::FakeVm;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::{Config, Platform};
use pagegate_core::machine::snapshot::resume::{Bytes, Snapshot};
use pagegate_core::policy::simple::Allow;
use proptest::prelude::*;
use serde_json::{Value, json};
use twox_hash::XxHash3_64;

const MEMORY: u64 = 4 << 20;

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn folder(name: &str) -> Folder {
    let path = std::env::temp_dir().join(format!("pagegate-snapshot-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    Folder(path)
}

fn fake() -> Arc<FakeVm> {
    Arc::new(FakeVm::new(FakeVm::plain(512), vec![Vec::new(), Vec::new()], 1))
}

fn add_devices(machine: &Machine) -> Result<(), Error> {
    machine.add_device("rng", Arc::new(Rng), false)?;
    let console = VirtioConsole::new(Arc::new(Console::default()))?;
    machine.add_device("console", Arc::new(console), false)
}

/// Puts a machine of two vCPUs and two devices aside.
fn put_aside(at: &Path) {
    let config = Config {
        platform: Platform::Pc,
        vcpus: 2,
        hypervisor: Some(fake()),
        ..Config::new(MEMORY, Arc::new(Allow))
    };
    let machine = Machine::new(config).unwrap();
    add_devices(&machine).unwrap();
    machine.write(0x1000, b"bytes").unwrap();
    machine.snapshot(at, &mut || Ok(())).unwrap();
}

/// Resumes it, and lets it run for a moment.
fn resume(at: &Path, lazy: bool) -> Result<(), Error> {
    let snapshot = Snapshot::open(at, &mut || Ok(()))?;
    let config = Config {
        hypervisor: Some(fake()),
        ..snapshot.config(Arc::new(Allow))?
    };
    let machine = Machine::new(config)?;
    add_devices(&machine)?;
    let bytes = if lazy { Bytes::Lazily } else { Bytes::Now };
    machine.resume(snapshot, bytes, &mut || Ok(()))?;
    // Nobody has started a vCPU, so it does not.
    let _ = machine.run(Some(Duration::from_millis(1)), &mut || Ok(()));
    Ok(())
}

fn sum(bytes: &[u8]) -> u64 {
    let mut sum = XxHash3_64::new();
    sum.write(bytes);
    sum.finish()
}

/// The places in a value that are no lists and no objects.
fn leaves(value: &Value, at: &str, into: &mut Vec<String>) {
    match value {
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(index, item)| leaves(item, &format!("{at}/{index}"), into)),
        Value::Object(fields) => fields
            .iter()
            .for_each(|(name, field)| leaves(field, &format!("{at}/{name}"), into)),
        _ => into.push(at.to_owned()),
    }
}

/// Changes a file's values, and the manifest so that its checksum fits.
fn tamper(at: &Path, changes: &[(usize, Value)]) {
    let mut state: Value = serde_json::from_slice(&fs::read(at.join("state.json")).unwrap()).unwrap();
    let mut places = Vec::new();
    leaves(&state, "", &mut places);
    // Most are the bytes of structures of KVM, of which any will do.
    places.retain(|place| !place.contains("/msrs/") || place.ends_with("/0"));
    for (index, value) in changes {
        *state.pointer_mut(&places[index % places.len()]).unwrap() = value.clone();
    }
    let bytes = serde_json::to_vec(&state).unwrap();
    fs::write(at.join("state.json"), &bytes).unwrap();
    let mut manifest: Value = serde_json::from_slice(&fs::read(at.join("manifest.json")).unwrap()).unwrap();
    manifest["sums"]["state"] = json!(sum(&bytes));
    fs::write(at.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
}

fn values() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!(0)),
        Just(json!(255)),
        Just(json!(u64::MAX)),
        any::<u64>().prop_map(|number| json!(number)),
        any::<u16>().prop_map(|number| json!(number)),
        any::<bool>().prop_map(|truth| json!(truth)),
        Just(json!(-1)),
        Just(Value::Null),
        Just(json!([])),
        Just(json!("text")),
        Just(json!([0, 0, 0, 0])),
    ]
}

#[test]
fn as_it_was_written_it_is_resumed() {
    let folder = folder("plain");
    put_aside(&folder.0);
    resume(&folder.0, false).unwrap();
    match resume(&folder.0, true) {
        // Not everybody has userfaultfd(2).
        Err(Error::NotSupported(why)) => assert!(why.contains("userfaultfd"), "{why}"),
        resumed => resumed.unwrap(),
    }
    tamper(&folder.0, &[]);
    resume(&folder.0, false).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn whatever_its_state_says_the_process_goes_on(
        changes in prop::collection::vec((any::<usize>(), values()), 1..5),
        lazy in any::<bool>(),
    ) {
        let folder = folder("tampered");
        put_aside(&folder.0);
        tamper(&folder.0, &changes);
        // Refused, or resumed: whichever, it says so.
        if let Err(error) = resume(&folder.0, lazy) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}

/// What a driver cannot have set is refused by name.
#[test]
fn a_device_that_no_driver_can_have_made() {
    let cases = [
        ("/pc/devices/0/registers/accepted", json!(u64::MAX), "features"),
        ("/pc/devices/0/registers/queues/0/size", json!(3), "queues"),
        ("/pc/devices/0/registers/queues/0/largest", json!(512), "queues"),
        ("/pc/devices/0/registers/queues", json!([]), "queues"),
        ("/pc/devices/0/msix", json!([]), "interrupts"),
        ("/pc/devices/0/rings", json!([]), "queues"),
        ("/pc/devices/0/id", json!(3), "type"),
        ("/pc/devices", json!([]), "devices"),
        ("/vcpus", json!([]), "another machine"),
        ("/pc/serial/received", json!(vec![0; 1000]), "FIFO"),
    ];
    for (place, value, said) in cases {
        let folder = folder("impossible");
        put_aside(&folder.0);
        let path = folder.0.join("state.json");
        let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        *state.pointer_mut(place).unwrap() = value;
        if place.ends_with("accepted") {
            // The driver has had its say.
            *state.pointer_mut("/pc/devices/0/registers/status").unwrap() = json!(11);
        }
        fs::write(&path, serde_json::to_vec(&state).unwrap()).unwrap();
        tamper(&folder.0, &[]);
        let error = resume(&folder.0, false).unwrap_err().to_string();
        assert!(error.contains(said), "{place}: {error}");
    }
}
