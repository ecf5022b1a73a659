#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    pagegate_fuzz::page_map::run(data);
});
