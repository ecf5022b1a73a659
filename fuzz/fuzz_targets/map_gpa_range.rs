#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    pagegate_fuzz::map_gpa_range::run(data);
});
