//! A device-dax (`/dev/daxX.Y`) as the place of a pool's pages: persistent or CXL memory that is mapped
//! and has neither read(2) nor write(2).
//!
//! [`DaxMemory::open`] locks the device and maps all of it, or says what is wrong with it
//! ([`device`]). Bytes are written past the processor's caches, so that they are in the memory itself when
//! [`DaxMemory::write_at`] returns: msync(2) does nothing for such a device, and another machine that
//! maps the same memory sees no cache of ours. Memory that the device cannot give back ends the reader
//! with SIGBUS.
//!
//! Who has a pool open holds a shared lock on the device (flock(2)), who formats one an exclusive one.

pub mod device;

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use pseudo_mm_uapi::Device;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::error::PoolError;
use crate::lease::{Mode, holders};
use device::DaxError;

/// An open device, mapped whole.
#[derive(Debug)]
pub(crate) struct DaxMemory {
    file: File,
    path: PathBuf,
    at: *mut u8,
    length: usize,
    /// The driver, with this device as its pool; none where it cannot be used.
    templates: OnceLock<Option<Device>>,
}

// SAFETY: the mapping stays where it is until it is dropped, and is only used by copying bytes out of
// and into it.
unsafe impl Send for DaxMemory {}
// SAFETY: as above. Nobody reads pages that are being written: a writer has them for itself.
unsafe impl Sync for DaxMemory {}

impl DaxMemory {
    /// Checks, locks and maps a device that has room for `least` bytes.
    pub fn open(path: &Path, least: u64, mode: Mode) -> Result<Self, PoolError> {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        let shape = opened.as_ref().ok().and_then(Shape::of);
        let Some(shape) = shape.filter(|shape| shape.holds(least)) else {
            device::fault(path, least)?;
            // It became fit meanwhile, or may not be opened.
            let source = opened.err().unwrap_or_else(|| Errno::AGAIN.into());
            return Err(PoolError::io("open the device", path, source));
        };
        let file = opened.map_err(|e| PoolError::io("open the device", path, e))?;
        let operation = match mode {
            Mode::Shared => FlockOperation::NonBlockingLockShared,
            Mode::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        match flock(&file, operation) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(DaxError::Busy {
                    path: path.to_path_buf(),
                    holders: holders(path),
                }
                .into());
            }
            Err(e) => return Err(PoolError::io("lock the device", path, e)),
        }
        let length = usize::try_from(shape.size)
            .map_err(|_| PoolError::io("map the device", path, Errno::OVERFLOW))?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                access,
                MapFlags::SHARED,
                &file,
                0,
            )
        }
        .map_err(|e| PoolError::io("map the device", path, e))?;
        // A child has no use for it. Where the advice fails, the child has it until it executes something.
        // SAFETY: advice about a mapping that is ours.
        let _ = unsafe { madvise(at, length, Advice::LinuxDontFork) };
        Ok(Self {
            file,
            path: path.to_path_buf(),
            at: at.cast(),
            length,
            templates: OnceLock::new(),
        })
    }

    pub fn size(&self) -> u64 {
        self.length as u64
    }

    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), PoolError> {
        let from = self.place(buffer.len(), offset)?;
        // SAFETY: `place` has checked that the range lies in the mapping, which stays; the buffer is
        // memory of its own.
        unsafe { std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), buffer.len()) };
        Ok(())
    }

    /// Writes whole pages; they are in the device's memory when this returns.
    pub fn write_at(&self, pages: &[u8], offset: u64) -> Result<(), PoolError> {
        use std::arch::x86_64::{_mm_loadu_si128, _mm_sfence, _mm_stream_si128};
        let whole = pages.len().is_multiple_of(crate::PAGE_SIZE);
        if !whole || !offset.is_multiple_of(crate::PAGE_SIZE as u64) {
            return Err(PoolError::PageLength { found: pages.len() });
        }
        let to = self.place(pages.len(), offset)?;
        for (index, part) in pages.chunks_exact(16).enumerate() {
            // SAFETY: SSE2 is a part of x86-64. The target lies in the mapping, as `place` has checked,
            // and at a multiple of 16 bytes, since mapping and offset are page-aligned.
            unsafe {
                let bytes = _mm_loadu_si128(part.as_ptr().cast());
                _mm_stream_si128(to.add(16 * index).cast(), bytes);
            };
        }
        // SAFETY: waits for this processor's own stores.
        unsafe { _mm_sfence() };
        Ok(())
    }

    fn place(&self, length: usize, offset: u64) -> Result<*mut u8, PoolError> {
        let inside = offset
            .checked_add(length as u64)
            .is_some_and(|end| end <= self.length as u64);
        if !inside {
            return Err(PoolError::Truncated {
                path: self.path.clone(),
                found: self.length as u64,
                expected: offset.saturating_add(length as u64),
            });
        }
        // SAFETY: the offset lies in the mapping.
        Ok(unsafe { self.at.add(offset as usize) })
    }

    /// The driver that maps the device's pages copy-on-write, if this machine has it.
    pub fn templates(&self) -> Option<&Device> {
        self.templates
            .get_or_init(|| match self.register() {
                Ok(device) => Some(device),
                Err(e) => {
                    tracing::warn!(
                        "Zygotes get copies of their pages instead of mapping {}: {} cannot be used \
                         ({e}); load the module pseudo_mm and start this again",
                        self.path.display(),
                        pseudo_mm_uapi::PATH,
                    );
                    None
                }
            })
            .as_ref()
    }

    fn register(&self) -> std::io::Result<Device> {
        let device = Device::open()?;
        device.register(&self.file.as_fd())?;
        Ok(device)
    }
}

impl Drop for DaxMemory {
    fn drop(&mut self) {
        // SAFETY: nobody uses the mapping any more.
        let _ = unsafe { munmap(self.at.cast(), self.length) };
        // A child forked meanwhile may still have the descriptor, so closing ours is not enough.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// What sysfs says of a device-dax that is open; nothing of anything else.
#[derive(Debug, Clone, Copy)]
struct Shape {
    size: u64,
    align: u64,
}

impl Shape {
    fn of(file: &File) -> Option<Self> {
        let number = file.metadata().ok()?.rdev();
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        let place = PathBuf::from(format!("/sys/dev/char/{major}:{minor}"));
        let bus = std::fs::read_link(place.join("subsystem")).ok()?;
        let number = |name: &str| {
            let text = std::fs::read_to_string(place.join(name)).ok()?;
            text.trim().parse().ok()
        };
        bus.ends_with("dax").then_some(())?;
        Some(Self {
            size: number("size")?,
            align: number("align")?,
        })
    }

    fn holds(self, least: u64) -> bool {
        self.align == crate::PAGE_SIZE as u64 && self.size >= least
    }
}
