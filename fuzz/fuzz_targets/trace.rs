#![no_main]

libfuzzer_sys::fuzz_target!(
    // The readers' panics on damaged files are caught by the core, and the hook of libfuzzer-sys would end the process
    // first. A panic that is not caught still does.
    init: std::panic::set_hook(Box::new(|_| ())),
    |data: &[u8]| {
        pagegate_fuzz::trace::run(data);
    }
);
