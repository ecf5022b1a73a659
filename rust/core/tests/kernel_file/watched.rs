//! Reading symbols is interrupted, whatever the file has: the watch is called often, and its failure ends it.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_sregs};
use pagegate_core::boot::kernel_file::KernelFile;
use pagegate_core::boot::kernel_file::symbols::Symbols;
use pagegate_core::boot::running_kernel::RunningKernel;
use pagegate_core::errno::Errno;
use pagegate_core::error::Error;
use pagegate_core::hypervisor::vm::Inspect;

use crate::elf::{EM_X86_64, ET_EXEC, STB_GLOBAL, STT_FUNC, Symbol, TEXT, elf, symbols_of, with_symbols};
use crate::stripped::{layouts, made_to_be_searched_for_ever, symbols, vmlinux as stripped};

/// The longest that Ctrl-C may have to wait.
const PROMPT: Duration = Duration::from_millis(100);

/// A symbol table from the highest address to the lowest, of a kernel with much code.
fn many_symbols() -> Vec<u8> {
    const COUNT: u64 = 100_000;
    let symbol = |name, address| Symbol {
        name,
        address,
        kind: STT_FUNC,
        binding: STB_GLOBAL,
    };
    let mut all = vec![symbol("_etext", TEXT + (32 << 20)), symbol("_text", TEXT)];
    all.extend(
        (0..COUNT)
            .rev()
            .map(|at| symbol("a_function_with_a_name", TEXT + 16 + at)),
    );
    with_symbols(&[(TEXT, &vec![0x90; 32 << 20])], &all)
}

/// Files that take long to read, each in another way.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    let mut decoys = vec![0x90; 64 << 20];
    for at in (0..decoys.len() - 64).step_by(4 << 20) {
        decoys[at..at + 20].copy_from_slice(b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0");
    }
    vec![
        ("a symbol table", many_symbols()),
        ("kallsyms", stripped(&symbols(60_000), layouts()[0])),
        ("kallsyms without a base", stripped(&symbols(60_000), layouts()[20])),
        ("nothing", elf(ET_EXEC, EM_X86_64, &[(TEXT, &vec![0x90; 64 << 20])])),
        ("what looks like tokens", elf(ET_EXEC, EM_X86_64, &[(TEXT, &decoys)])),
        ("what looks like markers", made_to_be_searched_for_ever()),
    ]
}

/// Reads the symbols with a watch that fails when it is called for the nth time. Returns how often it was called, the longest
/// time between two calls, and whether it was its failure that ended it.
fn watched(file: &[u8], nth: usize) -> (usize, Duration, bool) {
    let (mut calls, mut longest, mut last) = (0, Duration::ZERO, Instant::now());
    let mut look = || {
        calls += 1;
        longest = longest.max(last.elapsed());
        last = Instant::now();
        if calls == nth { Err("enough".into()) } else { Ok(()) }
    };
    let read = Symbols::read(file, &mut look);
    (
        calls,
        longest.max(last.elapsed()),
        matches!(read, Err(Error::Interrupted(_))),
    )
}

#[test]
fn the_watch_is_never_waited_for() {
    for (name, file) in files() {
        // The best of a few: other work may keep the processors busy.
        let longest = (0..20)
            .map(|_| watched(&file, usize::MAX).1)
            .find(|longest| *longest < PROMPT);
        assert!(longest.is_some(), "{name}");
    }
}

#[test]
fn each_of_its_failures_ends_it() {
    for (name, file) in files() {
        let (calls, _, interrupted) = watched(&file, usize::MAX);
        assert!(calls > 1 && !interrupted, "{name}: {calls}");
        let step = calls.div_ceil(5);
        for nth in (1..=calls).step_by(step).chain([calls]) {
            let (called, _, interrupted) = watched(&file, nth);
            assert!(interrupted && called == nth, "{name}: {nth} of {calls}, {called}");
        }
    }
}

/// No vCPU.
struct Nobody;

impl Inspect for Nobody {
    fn regs(&self) -> Result<kvm_regs, Errno> {
        Err(Errno(libc::EINVAL))
    }

    fn sregs(&self) -> Result<kvm_sregs, Errno> {
        Err(Errno(libc::EINVAL))
    }

    fn msr(&self, _: u32) -> Result<u64, Errno> {
        Err(Errno(libc::EINVAL))
    }

    fn translate(&self, _: u64) -> Option<u64> {
        None
    }
}

/// One thread reads them, and its watch does not return. Another that wants them, too, is asked by its own.
#[test]
fn a_thread_that_waits_for_another_is_interrupted() {
    let kernel = RunningKernel::new(KernelFile::parse(stripped(&symbols(700), layouts()[0])).unwrap());
    let (begun, begins) = mpsc::channel();
    let (over, ends) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let kernel = &kernel;
        let reads = scope.spawn(move || {
            let mut calls = 0;
            kernel.symbol(TEXT, &Nobody, &mut || {
                calls += 1;
                // The second call is made while it reads.
                if calls == 2 {
                    begun.send(()).unwrap();
                    ends.recv().unwrap();
                }
                Ok(())
            })
        });
        begins.recv().unwrap();
        let mut calls = 0;
        let waited = kernel.symbol(TEXT, &Nobody, &mut || {
            calls += 1;
            if calls == 3 { Err("enough".into()) } else { Ok(()) }
        });
        assert_eq!(waited.unwrap_err().to_string(), "enough");
        over.send(()).unwrap();
        assert_eq!(reads.join().unwrap().unwrap(), None);
        // They are kept, so that no watch is called any more.
        let known = kernel.symbol(TEXT, &Nobody, &mut || Err("enough".into()));
        assert_eq!(known.unwrap(), None);
    });
}

#[test]
fn the_names_are_no_larger_than_the_file() {
    let name: &'static str = "a_name_".repeat(140).leak();
    let mut all = Vec::new();
    for at in 0..3000 {
        all.push(Symbol {
            name: "",
            address: TEXT + at,
            kind: STT_FUNC,
            binding: STB_GLOBAL,
        });
    }
    all.push(Symbol { name, ..all[0].clone() });
    let mut file = with_symbols(&[(TEXT, &[0x90; 64])], &all);
    // All of them have the last one's name.
    let table = u64::from_le_bytes(*file[0x28..].first_chunk().unwrap()) as usize;
    let symtab = u64::from_le_bytes(*file[table + 64 + 0x18..].first_chunk().unwrap()) as usize;
    let entry = |number: usize| symtab + 24 * number;
    let last: [u8; 4] = *file[entry(3001)..].first_chunk().unwrap();
    for number in 1..=3000 {
        file[entry(number)..][..4].copy_from_slice(&last);
    }
    let reason = symbols_of(&file).unwrap_err();
    assert!(reason.contains("bytes of names"), "{reason}");
}

#[test]
fn too_many_program_headers() {
    let file = elf(ET_EXEC, EM_X86_64, &vec![(TEXT, &[][..]); 5000]);
    let reason = symbols_of(&file).unwrap_err();
    assert!(reason.contains("5000 program headers"), "{reason}");
}
