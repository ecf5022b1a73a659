//! The page tables and the GDT that a vCPU needs to start in long mode.

use crate::allocation::reserve;
use crate::error::Error;
use crate::memory::address::{PAGE_SIZE, State};
use crate::memory::views::Views;

pub(crate) const CODE_SELECTOR: u16 = 0x08;
pub(crate) const DATA_SELECTOR: u16 = 0x10;

const ENTRY_TABLE: u64 = 0b111;
const ENTRY_LARGE: u64 = 0b1000_0111;
const ENTRIES: usize = 512;
const LARGE_PAGE: u64 = 2 << 20;
const GIB_SHIFT: u32 = 30;
const GIB: u64 = 1 << GIB_SHIFT;
const PML4_SHIFT: u32 = 39;
/// The highest bit that a gpa may have set to be mapped at the same linear address: above it that is not canonical.
const HIGHEST_IDENTITY_BIT: u32 = 46;

const CODE64_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

/// The page tables and the GDT of mode "long", to be written to guest memory.
pub struct Tables {
    /// The gpa that they are to be at, without the view bit.
    pub gpa: u64,
    /// Their bytes: whole pages.
    pub bytes: Vec<u8>,
    /// The GDT's address, in the shared view.
    pub(crate) gdt: u64,
}

struct Builder {
    pages: Vec<[u64; ENTRIES]>,
    base: u64,
    views: Views,
}

impl Builder {
    /// A table's address in the shared view, which its page is in: walking the page tables is never a request.
    fn address(&self, page: usize) -> u64 {
        self.views.address(self.base + page as u64 * PAGE_SIZE, State::Shared)
    }

    /// The index of the table that `entry` of `table` refers to. Without one it becomes the table `next`.
    fn child(&mut self, table: usize, entry: u64, next: &mut usize) -> usize {
        let entry = (entry as usize) % ENTRIES;
        let present = self.pages[table][entry];
        if present != 0 {
            return ((present & !0xfff) - self.address(0)) as usize / PAGE_SIZE as usize;
        }
        let page = *next;
        *next += 1;
        self.pages[table][entry] = self.address(page) | ENTRY_TABLE;
        page
    }

    /// Identity-maps the GiB at `at`; with `whole` as one page, for which there is no table.
    fn map_gib(&mut self, at: u64, whole: bool, next: &mut usize) {
        let pdpt = self.child(0, at >> PML4_SHIFT, next);
        if whole {
            self.pages[pdpt][(at >> GIB_SHIFT) as usize % ENTRIES] = (at >> GIB_SHIFT << GIB_SHIFT) | ENTRY_LARGE;
            return;
        }
        let pd = self.child(pdpt, at >> GIB_SHIFT, next);
        for (i, entry) in self.pages[pd].iter_mut().enumerate() {
            *entry = ((at >> GIB_SHIFT << GIB_SHIFT) + i as u64 * LARGE_PAGE) | ENTRY_LARGE;
        }
    }
}

/// PML4; PDPT and PD of one view; PDPT and PD of the other; the GDT last. Also for less, so that small guests find all of
/// them at the same place.
const LEAST_PAGES: usize = 6;

/// How many pages the tables of each view take, and the GDT: a PDPT for each 512 GiB, and a PD for each GiB unless it is
/// one page.
fn table_pages(gibs: u64, gib_pages: bool, views: Views) -> usize {
    let pds = if gib_pages { 1 } else { gibs };
    let of_view = gibs.div_ceil(ENTRIES as u64) + pds;
    // Two views may have their first table in common.
    let all = 2 + of_view * if views.split() { 2 } else { 1 };
    (all as usize).max(LEAST_PAGES)
}

/// Builds page tables that identity-map all of memory in each view, and a GDT. They go to the top of memory. The first
/// GiB is mapped by pages of 2 MiB, and so are the others unless there are `gib_pages`.
///
/// # Errors
/// `Invalid` for memory without room for them, `NotSupported` for a view bit that long mode cannot map.
pub fn tables(views: Views, gib_pages: bool) -> Result<Tables, Error> {
    let gibs = views.memory_end().div_ceil(GIB);
    let pages = table_pages(gibs, gib_pages, views);
    let bytes = pages as u64 * PAGE_SIZE;
    let Some(base) = views.memory_end().checked_sub(bytes) else {
        let message = format!("mode \"long\" keeps {bytes:#x} bytes of tables at the top of memory; give it more");
        return Err(Error::Invalid(message));
    };
    if views.mask() >> HIGHEST_IDENTITY_BIT > 1 {
        let message = format!(
            "mode \"long\" maps both views to themselves, so shared_bit or private_bit is at most {HIGHEST_IDENTITY_BIT}"
        );
        return Err(Error::NotSupported(message));
    }
    // A guest of TiBs without pages of a GiB has megabytes of them.
    let mut tables = Vec::new();
    let what = "build the page tables of mode \"long\"";
    reserve(&mut tables, pages).map_err(|errno| Error::Host { what, errno })?;
    tables.resize(pages, [0; ENTRIES]);
    let mut builder = Builder {
        pages: tables,
        base,
        views,
    };
    let mut next = 1;
    for gib in 0..gibs {
        let whole = gib_pages && gib > 0;
        builder.map_gib(gib * GIB, whole, &mut next);
        if views.split() {
            builder.map_gib(views.mask() | (gib * GIB), whole, &mut next);
        }
    }
    let gdt = pages - 1;
    builder.pages[gdt][usize::from(CODE_SELECTOR / 8)] = CODE64_DESCRIPTOR;
    builder.pages[gdt][usize::from(DATA_SELECTOR / 8)] = DATA_DESCRIPTOR;
    let mut bytes = Vec::new();
    reserve(&mut bytes, pages * PAGE_SIZE as usize).map_err(|errno| Error::Host { what, errno })?;
    bytes.extend(builder.pages.iter().flatten().flat_map(|entry| entry.to_le_bytes()));
    Ok(Tables {
        gpa: base,
        gdt: builder.address(gdt),
        bytes,
    })
}
