//! Which pages the benchmarks of page states use.

/// Pages in a block of 2 MiB.
pub const BLOCK: u64 = 512;

/// `count` different pages below `pages`, in no order, and the same ones each time.
pub fn scattered(count: u64, pages: u64) -> Vec<u64> {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let share = pages / count;
    let mut all: Vec<u64> = (0..count).map(|i| i * share + random(share)).collect();
    for i in (1..all.len()).rev() {
        all.swap(i, random(i as u64 + 1) as usize);
    }
    all
}
