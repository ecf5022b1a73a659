//! The symbols of a stripped vmlinux, from its kallsyms tables.

use std::collections::BTreeMap;

use pagegate_core::boot::kernel_file::symbols::Symbols;
use proptest::prelude::*;

use crate::elf::{EM_X86_64, ET_EXEC, TEXT, elf, symbols_of};
use crate::kallsyms_model::{Layout, Order, Symbol, tables};

const TEXT_SIZE: u64 = 0x8000;
const DATA: u64 = TEXT + 0x20_0000;

/// A vmlinux with `symbols` in its read-only data, after bytes that look like a token table, and `text` before it.
pub fn vmlinux(symbols: &[Symbol], layout: Layout) -> Vec<u8> {
    let text: Vec<u8> = (0..TEXT_SIZE).map(|at| at as u8).collect();
    let mut image = text;
    image.extend(b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0 and no table");
    image.resize(image.len().next_multiple_of(64), 0xcc);
    let at = TEXT + image.len() as u64;
    image.extend(tables(symbols, layout, at));
    image.extend([0xcc; 100]);
    elf(ET_EXEC, EM_X86_64, &[(TEXT, &image), (0, &[1; 64]), (DATA, &[2; 64])])
}

/// The symbols that the code's bounds come from, `count` others in the code, and two in the data.
pub fn symbols(count: u64) -> Vec<Symbol> {
    let mut symbols = vec![(TEXT, 'T', "_text".to_owned()), (TEXT, 'T', "startup_64".to_owned())];
    for index in 0..count {
        symbols.push((TEXT + 16 + index * 8, 't', format!("symbol_{index:08}_on")));
    }
    symbols.push((TEXT + TEXT_SIZE, 'T', "_etext".to_owned()));
    symbols.push((DATA, 'D', "some_data".to_owned()));
    symbols.push((DATA + 8, 'D', "idt_table".to_owned()));
    symbols
}

pub fn layouts() -> Vec<Layout> {
    let mut layouts = Vec::new();
    for order in [Order::OffsetsFirst, Order::OffsetsLast, Order::SelfRelative] {
        for flags in 0..8 {
            let layout = Layout {
                order,
                absolute_percpu: flags & 1 != 0,
                wide_markers: flags & 2 != 0,
                sequence: flags & 4 != 0,
            };
            layouts.push(layout);
        }
    }
    layouts
}

/// Every symbol of `expected` is found under its name and at its address.
fn check(found: &Symbols, expected: &[Symbol]) {
    let inside: Vec<&Symbol> = expected.iter().filter(|symbol| symbol.0 >= TEXT).collect();
    assert_eq!(found.count(), inside.len());
    let mut names = BTreeMap::new();
    let mut addresses = BTreeMap::new();
    for (address, _, name) in inside {
        names.entry(name.as_str()).or_insert(*address);
        addresses.entry(*address).or_insert(name.as_str());
    }
    for (name, address) in names {
        assert_eq!(found.address(name), Some(address), "{name}");
    }
    for (address, name) in addresses {
        let expected = (address < TEXT + TEXT_SIZE).then_some((name, 0));
        assert_eq!(found.find(address), expected);
    }
}

#[test]
fn every_order() {
    let expected = symbols(700);
    for layout in layouts() {
        let found = symbols_of(&vmlinux(&expected, layout)).unwrap_or_else(|error| panic!("{layout:?}: {error}"));
        check(&found, &expected);
    }
}

#[test]
fn per_cpu_variables_are_left_out() {
    let mut expected = symbols(700);
    expected.insert(0, (0, 'A', "fixed_percpu_data".to_owned()));
    expected.insert(1, (0x1000, 'A', "some_percpu_data".to_owned()));
    let layout = Layout {
        order: Order::OffsetsLast,
        absolute_percpu: true,
        wide_markers: false,
        sequence: true,
    };
    let found = symbols_of(&vmlinux(&expected, layout)).unwrap();
    check(&found, &expected);
    assert_eq!(found.address("some_percpu_data"), None);
}

#[test]
fn code_and_what_lies_between_symbols() {
    let layout = layouts()[0];
    let found = symbols_of(&vmlinux(&symbols(700), layout)).unwrap();
    assert_eq!(found.find(TEXT), Some(("_text", 0)));
    assert_eq!(found.find(TEXT + 15), Some(("_text", 15)));
    assert_eq!(found.find(TEXT + 16 + 8 * 40 + 3), Some(("symbol_00000040_on", 3)));
    assert_eq!(
        found.find(TEXT + TEXT_SIZE - 1),
        Some(("symbol_00000699_on", TEXT_SIZE - 17 - 699 * 8))
    );
    for outside in [0, TEXT - 1, TEXT + TEXT_SIZE, DATA, u64::MAX] {
        assert_eq!(found.find(outside), None);
        assert_eq!(found.code(outside, 1), None);
    }
    assert_eq!(found.code(TEXT + 5, 4), Some(&[5, 6, 7, 8][..]));
    assert_eq!(found.code(TEXT + TEXT_SIZE - 2, 2), Some(&[0xfe, 0xff][..]));
    assert_eq!(found.code(TEXT + TEXT_SIZE - 2, 3), None);
    assert_eq!(found.code(TEXT, usize::MAX), None);
}

#[test]
fn a_slide() {
    let found = symbols_of(&vmlinux(&symbols(700), layouts()[0])).unwrap();
    let moved = |slide: u64| found.slide(&[("idt_table", DATA + 8 + slide)]);
    assert_eq!(moved(0), Some(0));
    assert_eq!(moved(0x1ea0_0000), Some(0x1ea0_0000));
    assert_eq!(moved(0x3fe0_0000), Some(0x3fe0_0000));
    assert_eq!(moved(0x4000_0000), None);
    assert_eq!(moved(0x10_0000), None);
    assert_eq!(found.slide(&[("idt_table", DATA)]), None);
    assert_eq!(found.slide(&[]), None);
    // The first that is possible: the IDT is elsewhere, and one of the names is not known.
    let anchors = [
        ("idt_table", 0xffff_fe00_0000_0000),
        ("bringup_idt_table", 0xffff_fe00_0000_0000),
        ("startup_64", TEXT + 0x60_0000),
    ];
    assert_eq!(found.slide(&anchors), Some(0x60_0000));
}

#[test]
fn long_names() {
    let mut expected = symbols(700);
    expected[300].2 = "Q".repeat(200);
    expected[301].2 = "R".repeat(511);
    for layout in layouts() {
        check(&symbols_of(&vmlinux(&expected, layout)).unwrap(), &expected);
    }
    expected[300].2 = "Q".repeat(1024);
    check(&symbols_of(&vmlinux(&expected, layouts()[0])).unwrap(), &expected);
    // Longer than any kernel has.
    expected[300].2 = "Q".repeat(1025);
    let reason = symbols_of(&vmlinux(&expected, layouts()[0])).unwrap_err();
    assert!(reason.contains("way that is not known"), "{reason}");
    // Short in the table, and long when its tokens are put together.
    expected[300].2 = "symbol".repeat(300);
    let reason = symbols_of(&vmlinux(&expected, layouts()[0])).unwrap_err();
    assert!(reason.contains("no valid name"), "{reason}");
}

#[test]
fn names_with_control_characters() {
    let mut expected = symbols(700);
    expected[300].2 = "clear\x1b[2Jscreen".to_owned();
    let reason = symbols_of(&vmlinux(&expected, layouts()[0])).unwrap_err();
    assert!(reason.contains("no valid name"), "{reason}");
}

#[test]
fn a_kernel_without_symbols() {
    let bare = elf(ET_EXEC, EM_X86_64, &[(TEXT, &[0x90; 5000])]);
    let reason = symbols_of(&bare).unwrap_err();
    assert!(reason.contains("CONFIG_KALLSYMS"), "{reason}");

    let mut unbound = symbols(700);
    unbound[0].2 = "begin".to_owned();
    let reason = symbols_of(&vmlinux(&unbound, layouts()[0])).unwrap_err();
    assert!(reason.contains("_text"), "{reason}");

    let mut descending = symbols(700);
    descending.swap(100, 600);
    for layout in layouts() {
        let reason = symbols_of(&vmlinux(&descending, layout)).unwrap_err();
        assert!(reason.contains("way that is not known"), "{layout:?}: {reason}");
    }
}

/// Each place could be the markers, and each place before could be names.
pub fn made_to_be_searched_for_ever() -> Vec<u8> {
    let good = tables(&symbols(700), layouts()[0], TEXT);
    let tokens = good.len() - tables_from_tokens(&good);
    let mut image = Vec::new();
    for _ in 0..1 << 19 {
        image.extend([0_u32, 512].map(u32::to_le_bytes).concat());
    }
    image.extend(&good[tokens..]);
    elf(ET_EXEC, EM_X86_64, &[(TEXT, &image)])
}

#[test]
fn a_search_that_has_to_give_up() {
    let reason = symbols_of(&made_to_be_searched_for_ever()).unwrap_err();
    assert!(reason.contains("way that is not known"), "{reason}");
}

/// How many bytes of the tables are from the tokens on.
fn tables_from_tokens(tables: &[u8]) -> usize {
    let digits = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
    let zero = tables
        .windows(digits.len())
        .position(|window| window == digits)
        .unwrap();
    // The codes before the first digit: frequent texts, then empty ones, which are a NUL each.
    let nuls = tables[..zero].iter().enumerate().rev().filter(|(_, byte)| **byte == 0);
    let start = nuls.map(|(at, _)| at).nth(48).unwrap() + 1;
    tables.len() - start
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_names_in_any_order(
        steps in prop::collection::vec((0_u64..40, "[a-zA-Z_.$][a-zA-Z0-9_.$]{0,60}"), 260..600),
        order in 0_usize..24,
    ) {
        let mut expected = vec![(TEXT, 'T', "_text".to_owned()), (TEXT, 't', "all_0123456789".to_owned())];
        let mut address = TEXT;
        for (step, name) in steps {
            address = (address + step).min(TEXT + TEXT_SIZE - 1);
            expected.push((address, 't', name));
        }
        expected.push((TEXT + TEXT_SIZE, 'T', "_etext".to_owned()));
        let layout = layouts()[order];
        check(&symbols_of(&vmlinux(&expected, layout)).unwrap(), &expected);
    }
}
