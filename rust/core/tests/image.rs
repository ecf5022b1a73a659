//! Images: good files are loaded as they say, and bad ones are refused without a panic.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::sync::Arc;

use pagegate_core::boot::image::{Image, Segment};
use pagegate_core::error::Error;
use pagegate_core::hypervisor::fake::FakeVm;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::Config;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::policy::simple::Allow;
use proptest::collection::vec;
use proptest::prelude::*;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;

/// A program header, its fields as they are in the file.
#[derive(Clone, Copy, Debug)]
struct Program {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

fn elf(machine: u16, entry: u64, programs: &[Program], body: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2_u16.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for word in [entry, HEADER as u64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [HEADER as u16, PROGRAM_HEADER as u16, programs.len() as u16, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for program in programs {
        file.extend(program.kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        let Program {
            offset,
            vaddr,
            paddr,
            filesz,
            memsz,
            ..
        } = program;
        for word in [offset, vaddr, paddr, filesz, memsz, &1] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(body);
    file
}

/// A good file and its segments' bytes: two segments linked at high virtual addresses, the second one with zeroes after
/// its bytes.
fn good() -> (Vec<u8>, Vec<u8>) {
    let body: Vec<u8> = (0..200).collect();
    let start = (HEADER + 3 * PROGRAM_HEADER) as u64;
    let code = Program {
        kind: PT_LOAD,
        offset: start,
        vaddr: 0xffff_8000_0000_1000,
        paddr: 0x1000,
        filesz: 120,
        memsz: 120,
    };
    let note = Program {
        kind: PT_NOTE,
        paddr: 0x9000,
        ..code
    };
    let data = Program {
        offset: start + 120,
        vaddr: 0xffff_8000_0000_3ff0,
        paddr: 0x3ff0,
        filesz: 80,
        memsz: 0x2010,
        ..code
    };
    (elf(EM_X86_64, code.vaddr + 0x20, &[code, note, data], &body), body)
}

fn machine(initial: State) -> Machine {
    machine_of(initial, 32 * PAGE_SIZE)
}

fn machine_of(initial: State, memory: u64) -> Machine {
    let config = Config {
        initial,
        hypervisor: Some(Arc::new(FakeVm::new(FakeVm::plain(512), Vec::new(), 1))),
        ..Config::new(memory, Arc::new(Allow))
    };
    Machine::new(config).unwrap()
}

/// What has to be true of every image that was made of `file`.
fn check(image: &Image<'_>, file: &[u8]) {
    assert!(!image.segments.is_empty());
    let inside = file.as_ptr_range();
    for Segment { bytes, .. } in &image.segments {
        let bytes = bytes.as_ptr_range();
        assert!(bytes.is_empty() || inside.start <= bytes.start && bytes.end <= inside.end);
    }
}

#[test]
fn segments_go_to_their_physical_addresses() {
    let (file, body) = good();
    assert!(Image::is_elf(&file));
    let image = Image::elf(&file).unwrap();
    check(&image, &file);
    let code = Segment {
        gpa: 0x1000,
        bytes: &body[..120],
        zeroes: 0,
    };
    let data = Segment {
        gpa: 0x3ff0,
        bytes: &body[120..],
        zeroes: 0x2010 - 80,
    };
    assert_eq!(image.segments, [code, data]);
    // The entry in the file is a virtual address; the guest starts at the physical one.
    assert_eq!(image.entry, 0x1020);
}

#[test]
fn an_entry_in_no_segment_stays_as_it_is() {
    let (mut file, _) = good();
    file[24..32].copy_from_slice(&0x1234_u64.to_le_bytes());
    assert_eq!(Image::elf(&file).unwrap().entry, 0x1234);
}

#[test]
fn a_loaded_image_is_shared_and_has_its_zeroes() {
    for initial in [State::Shared, State::Private] {
        let (file, body) = good();
        let machine = machine(initial);
        machine.convert(0x3000, 0x4000, State::Shared).unwrap();
        machine.write(0x3000, &[0xaa; 0x4000]).unwrap();
        machine.convert(0x5000, 0x1000, State::Private).unwrap();
        let entry = machine.load(&Image::elf(&file).unwrap(), &mut || Ok(())).unwrap();
        assert_eq!(entry, 0x1020);
        let read = |gpa: u64, len: usize| {
            let mut bytes = vec![0; len];
            machine.read(gpa, &mut bytes).unwrap();
            bytes
        };
        assert_eq!(read(0x1000, 120), body[..120]);
        assert_eq!(read(0x3ff0, 80), body[120..]);
        assert!(
            read(0x3ff0 + 80, 0x2010 - 80).iter().all(|byte| *byte == 0),
            "old bytes in place of zeroes"
        );
        assert_eq!(read(0x3fe0, 16), [0xaa; 16], "bytes before the image changed");
        assert_eq!(read(0x6000, 16), [0xaa; 16], "bytes after the image changed");
        assert_eq!(machine.memory().describe(page(0x8000)), initial.as_str());
    }
}

fn page(gpa: u64) -> Range {
    Range::new(gpa, PAGE_SIZE).unwrap()
}

#[test]
fn raw_bytes_go_where_they_are_told() {
    let machine = machine(State::Shared);
    let image = Image::raw(&[1, 2, 3], 0x1ffe);
    assert!(!Image::is_elf(&[1, 2, 3]));
    assert_eq!(machine.load(&image, &mut || Ok(())).unwrap(), 0x1ffe);
    let mut bytes = [9; 5];
    machine.read(0x1ffd, &mut bytes).unwrap();
    assert_eq!(bytes, [0, 1, 2, 3, 0]);
    assert_eq!(
        machine.load(&Image::raw(&[], 1 << 60), &mut || Ok(())).unwrap(),
        1 << 60
    );
}

#[test]
fn files_of_another_kind_are_refused() {
    let (file, _) = good();
    let with = |at: usize, byte: u8| {
        let mut file = file.clone();
        file[at] = byte;
        file
    };
    let load = Program {
        kind: PT_LOAD,
        offset: 0,
        vaddr: 0,
        paddr: 0,
        filesz: 0,
        memsz: 0,
    };
    let note = Program {
        kind: PT_NOTE,
        memsz: 8,
        ..load
    };
    let outside = Program {
        filesz: 4096,
        memsz: 4096,
        ..load
    };
    let wraps = Program {
        offset: u64::MAX - 8,
        filesz: 4096,
        memsz: 4096,
        ..load
    };
    let bad = [
        ("32 bits", with(4, 1)),
        ("big endian", with(5, 2)),
        ("no magic", with(0, 0)),
        ("another CPU", with(18, EM_AARCH64 as u8)),
        ("nothing", Vec::new()),
        ("only the magic", b"\x7fELF".to_vec()),
        ("no program headers", elf(EM_X86_64, 0, &[], &[])),
        ("nothing to load", elf(EM_X86_64, 0, &[load, note], &[0; 64])),
        ("a segment outside the file", elf(EM_X86_64, 0, &[outside], &[0; 64])),
        ("a segment that wraps", elf(EM_X86_64, 0, &[wraps], &[0; 64])),
    ];
    for (what, file) in bad {
        assert!(matches!(Image::elf(&file), Err(Error::Invalid(_))), "{what}");
    }
}

#[test]
fn images_outside_memory_are_refused() {
    let machine = machine(State::Private);
    let memory = 32 * PAGE_SIZE;
    let cases = [
        (memory, 1, 0),
        (memory - 1, 2, 0),
        (0, 1, memory),
        (u64::MAX, 1, 0),
        (u64::MAX - 1, 1, 1),
        (0x1000, 1, u64::MAX),
        (1 << 40, 8, 8),
    ];
    for (gpa, len, zeroes) in cases {
        let bytes = vec![0x90; len];
        let segments = vec![Segment {
            gpa,
            bytes: &bytes,
            zeroes,
        }];
        let image = Image { segments, entry: 0 };
        assert!(
            matches!(machine.load(&image, &mut || Ok(())), Err(Error::Invalid(_))),
            "{image:x?}"
        );
        assert_eq!(machine.memory().snapshot().generation(), 0, "{image:x?}");
    }
    let whole = Segment {
        gpa: 0,
        bytes: &[1],
        zeroes: memory - 1,
    };
    let image = Image {
        segments: vec![whole],
        entry: 0,
    };
    machine.load(&image, &mut || Ok(())).unwrap();
}

fn filling(paddr: u64, memsz: u64) -> Program {
    Program {
        kind: PT_LOAD,
        offset: 0,
        vaddr: 0,
        paddr,
        filesz: 0,
        memsz,
    }
}

#[test]
fn segments_that_overlap_are_refused() {
    let memory = 32 * PAGE_SIZE;
    let overlapping = [
        vec![filling(0, memory); 65_534],
        vec![filling(0x2000, 1), filling(0x1000, 0x1001)],
        vec![filling(0x1000, u64::MAX), filling(0x2000, 1)],
    ];
    for programs in overlapping {
        let error = Image::elf(&elf(EM_X86_64, 0, &programs, &[])).unwrap_err();
        assert!(error.to_string().contains("segments overlap"), "{error}");
    }
    // They may touch, and be in any order.
    let programs = [filling(0x2000, 1), filling(0x1000, 0x1000), filling(0x2001, 0xfff)];
    assert_eq!(
        Image::elf(&elf(EM_X86_64, 0, &programs, &[])).unwrap().segments.len(),
        3
    );
}

#[test]
fn loading_can_be_given_up() {
    let machine = machine_of(State::Private, 200 << 20);
    let image = Image {
        segments: vec![Segment {
            gpa: 0x1010,
            bytes: &[1],
            zeroes: (190 << 20) - 1,
        }],
        entry: 0,
    };
    let mut calls = 0;
    machine
        .load(&image, &mut || {
            calls += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(calls, 3);
    let mut left = 2;
    let mut watch = || {
        left -= 1;
        match left {
            0 => Err("enough".into()),
            _ => Ok(()),
        }
    };
    let error = machine.load(&image, &mut watch).unwrap_err();
    assert!(matches!(error, Error::Interrupted(_)), "{error:?}");
    assert_eq!(left, 0);
}

#[test]
fn truncated_files_are_refused() {
    let (file, _) = good();
    let mut found = 0;
    for len in 0..file.len() {
        if let Ok(image) = Image::elf(&file[..len]) {
            check(&image, &file[..len]);
            found += 1;
        }
    }
    assert_eq!(found, 0, "a file with a segment cut off was taken");
}

fn edges() -> impl Strategy<Value = u64> {
    let edge = vec![
        0,
        1,
        0x40,
        0x100,
        0x1000,
        0x1fff,
        0x20000,
        1 << 32,
        1 << 63,
        u64::MAX - 0xfff,
        u64::MAX,
    ];
    prop_oneof![3 => prop::sample::select(edge), 2 => 0..0x400_u64, 1 => any::<u64>()]
}

fn programs() -> impl Strategy<Value = Program> {
    let kind = prop_oneof![4 => Just(PT_LOAD), 1 => any::<u32>()];
    (kind, edges(), edges(), edges(), edges(), edges()).prop_map(|(kind, offset, vaddr, paddr, filesz, memsz)| {
        Program {
            kind,
            offset,
            vaddr,
            paddr,
            filesz,
            memsz,
        }
    })
}

thread_local! {
    static MACHINE: Machine = machine(State::Shared);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_bytes_are_loaded_or_refused(file in vec(any::<u8>(), 0..600), magic in any::<bool>()) {
        let mut file = file;
        if magic && file.len() > 6 {
            file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        }
        if let Ok(image) = Image::elf(&file) {
            check(&image, &file);
        }
    }

    #[test]
    fn a_good_file_with_bytes_changed_is_loaded_or_refused(changes in vec((0..432_usize, any::<u8>()), 1..12), len in prop_oneof![4 => Just(432_usize), 1 => 0..432_usize]) {
        let (mut file, _) = good();
        prop_assert_eq!(file.len(), 432);
        for (at, byte) in changes {
            file[at] = byte;
        }
        file.truncate(len);
        if let Ok(image) = Image::elf(&file) {
            check(&image, &file);
            let _ = MACHINE.with(|machine| machine.load(&image, &mut || Ok(())));
        }
    }

    #[test]
    fn program_headers_with_any_numbers_are_loaded_or_refused(entry in edges(), programs in vec(programs(), 0..5), body in vec(any::<u8>(), 0..300)) {
        let file = elf(EM_X86_64, entry, &programs, &body);
        let loaded = programs.iter().filter(|program| program.kind == PT_LOAD && program.memsz > 0);
        let inside = |program: &Program| u128::from(program.offset) + u128::from(program.filesz) <= file.len() as u128;
        let fits = |program: &Program| inside(program) && program.filesz <= program.memsz;
        match Image::elf(&file) {
            Ok(image) => {
                check(&image, &file);
                prop_assert_eq!(image.segments.len(), loaded.clone().count());
                for (segment, program) in image.segments.iter().zip(loaded) {
                    prop_assert!(fits(program) || program.filesz == 0);
                    prop_assert_eq!(segment.gpa, program.paddr);
                    prop_assert_eq!(segment.bytes.len() as u64, program.filesz);
                    prop_assert_eq!(segment.zeroes, program.memsz.saturating_sub(program.filesz));
                }
                // Loading either succeeds or says why not.
                let _ = MACHINE.with(|machine| machine.load(&image, &mut || Ok(())));
            }
            Err(Error::Invalid(_)) => {
                let end = |program: &Program| program.paddr.saturating_add(program.memsz);
                let mut all: Vec<&Program> = loaded.clone().collect();
                all.sort_by_key(|program| (program.paddr, program.memsz));
                let overlap = all.windows(2).any(|pair| end(pair[0]) > pair[1].paddr);
                prop_assert!(all.is_empty() || overlap || !loaded.clone().all(fits));
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}
