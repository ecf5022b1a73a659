//! Each target's inputs in `corpus`: seeds, and what was found to fail once.

use std::fs::{read, read_dir};
use std::path::{Path, PathBuf};

use pagegate_fuzz::{
    decode, image, kernel_file, linux, map_gpa_range, page_map, ranges, trace, virtio_block, virtio_console,
    virtio_net, virtio_registers, virtio_rng, virtio_vsock,
};

type Target = (&'static str, fn(&[u8]) -> bool);

const TARGETS: [Target; 14] = [
    ("decode", decode::run),
    ("image", image::run),
    ("kernel_file", kernel_file::run),
    ("linux", linux::run),
    ("map_gpa_range", map_gpa_range::run),
    ("page_map", page_map::run),
    ("ranges", ranges::run),
    ("trace", trace::run),
    ("virtio_block", virtio_block::run),
    ("virtio_console", virtio_console::run),
    ("virtio_net", virtio_net::run),
    ("virtio_registers", virtio_registers::run),
    ("virtio_rng", virtio_rng::run),
    ("virtio_vsock", virtio_vsock::run),
];

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<_> = read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn every_input_is_taken_and_some_are_accepted() {
    for (name, run) in TARGETS {
        let mut accepted = 0;
        for path in files(&format!("corpus/{name}")) {
            println!("{}", path.display());
            println!("{}", path.display());
            accepted += usize::from(run(&read(path).unwrap()));
        }
        assert!(accepted > 0, "{name}: no input gets past the first checks");
    }
}

#[test]
fn every_target_has_a_corpus() {
    let stems = |folder| -> Vec<String> {
        let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        files(folder).into_iter().map(stem).collect()
    };
    let names = TARGETS.map(|(name, _)| name);
    assert_eq!(stems("fuzz_targets"), names);
    assert_eq!(stems("corpus"), names);
}
