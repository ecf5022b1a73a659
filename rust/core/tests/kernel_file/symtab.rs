//! The symbols of a vmlinux that was not stripped.

use pagegate_core::boot::kernel_file::symbols::Symbols;

use crate::elf::{
    STB_GLOBAL, STB_LOCAL, STT_FILE, STT_FUNC, STT_NOTYPE, STT_OBJECT, Symbol, TEXT, symbols_of, with_symbols,
};

const INIT: u64 = TEXT + 0x10_0000;

fn symbol(name: &'static str, address: u64, kind: u8, binding: u8) -> Symbol {
    Symbol {
        name,
        address,
        kind,
        binding,
    }
}

fn read(symbols: &[Symbol]) -> Result<Symbols, String> {
    symbols_of(&with_symbols(
        &[(TEXT, &[0x90; 0x1000]), (INIT, &[0xcc; 0x100])],
        symbols,
    ))
}

fn bounds() -> Vec<Symbol> {
    vec![
        symbol("_etext", TEXT + 0x800, STT_NOTYPE, STB_GLOBAL),
        symbol("_text", TEXT, STT_NOTYPE, STB_GLOBAL),
        symbol("_sinittext", INIT, STT_NOTYPE, STB_GLOBAL),
        symbol("_einittext", INIT + 0x80, STT_NOTYPE, STB_GLOBAL),
    ]
}

#[test]
fn in_any_order() {
    let mut symbols = bounds();
    symbols.push(symbol("second", TEXT + 0x200, STT_FUNC, STB_LOCAL));
    symbols.push(symbol("first", TEXT + 0x100, STT_FUNC, STB_GLOBAL));
    symbols.push(symbol("early", INIT + 0x10, STT_FUNC, STB_LOCAL));
    symbols.push(symbol("idt_table", TEXT + 0x900, STT_OBJECT, STB_LOCAL));
    let found = read(&symbols).unwrap();
    assert_eq!(found.count(), 8);
    assert_eq!(found.find(TEXT + 0x1ff), Some(("first", 0xff)));
    assert_eq!(found.find(TEXT + 0x200), Some(("second", 0)));
    assert_eq!(found.find(TEXT + 0x800), None);
    assert_eq!(found.find(INIT + 0x1f), Some(("early", 0xf)));
    assert_eq!(found.find(INIT + 0x80), None);
    assert_eq!(found.address("idt_table"), Some(TEXT + 0x900));
    assert_eq!(found.address("third"), None);
    assert_eq!(found.code(INIT + 0x7f, 1), Some(&[0xcc][..]));
    assert_eq!(found.code(INIT + 0x7f, 2), None);
}

#[test]
fn the_best_name_at_an_address() {
    let mut symbols = bounds();
    symbols.push(symbol("label", TEXT + 0x100, STT_NOTYPE, STB_GLOBAL));
    symbols.push(symbol("local", TEXT + 0x100, STT_FUNC, STB_LOCAL));
    symbols.push(symbol("__x64_call", TEXT + 0x100, STT_FUNC, STB_GLOBAL));
    symbols.push(symbol("call", TEXT + 0x100, STT_FUNC, STB_GLOBAL));
    assert_eq!(read(&symbols).unwrap().find(TEXT + 0x101), Some(("call", 1)));
}

#[test]
fn symbols_that_name_nothing_in_the_kernel() {
    let mut symbols = bounds();
    symbols.push(symbol("main.c", TEXT + 0x100, STT_FILE, STB_LOCAL));
    symbols.push(symbol(".Lloop", TEXT + 0x100, STT_NOTYPE, STB_LOCAL));
    symbols.push(symbol("__crc_printk", TEXT + 0x100, STT_NOTYPE, STB_LOCAL));
    symbols.push(symbol("percpu", 0x100, STT_OBJECT, STB_LOCAL));
    symbols.push(symbol("", TEXT + 0x100, STT_FUNC, STB_LOCAL));
    symbols.push(symbol("a name", TEXT + 0x100, STT_FUNC, STB_LOCAL));
    let found = read(&symbols).unwrap();
    assert_eq!(found.count(), 4);
    assert_eq!(found.find(TEXT + 0x101), Some(("_text", 0x101)));
}

#[test]
fn no_bounds() {
    let reason = read(&[symbol("lonely", TEXT, STT_FUNC, STB_GLOBAL)]).unwrap_err();
    assert!(reason.contains("_etext"), "{reason}");
}

#[test]
fn none_in_the_kernel_is_none_at_all() {
    let reason = read(&[symbol("percpu", 0x100, STT_OBJECT, STB_LOCAL)]).unwrap_err();
    assert!(reason.contains("CONFIG_KALLSYMS"), "{reason}");
}
