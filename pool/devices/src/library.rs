//! The part of libdaxctl that is called here; declared from its header (`build.rs`).
//!
//! A context has a list of regions, each of which has a list of devices. Both are read from sysfs when their
//! first element is asked for, and belong to the context until it goes.

use std::ffi::{CStr, c_char};
use std::fs;
use std::io;
use std::path::Path;
use std::ptr::{self, NonNull};

use trenv_devices::{DaxDevice, DaxMode};

#[allow(non_camel_case_types, clippy::all)]
mod declared {
    include!(concat!(env!("OUT_DIR"), "/libdaxctl.rs"));
}
use declared::{daxctl_ctx, daxctl_dev, daxctl_region};

/// A context of the library.
pub struct Library(NonNull<daxctl_ctx>);

impl Library {
    pub fn new() -> io::Result<Self> {
        let mut context = ptr::null_mut();
        // SAFETY: the library writes the context that it has made, or nothing.
        let status = unsafe { declared::daxctl_new(&raw mut context) };
        NonNull::new(context)
            .map(Self)
            .ok_or_else(|| io::Error::from_raw_os_error(-status))
    }

    pub fn devices(&self) -> Vec<DaxDevice> {
        let mut found = Vec::new();
        // SAFETY: the context is there until it is dropped, and so are its regions and their devices, which
        // are elements of lists that end with null.
        unsafe {
            let mut region = declared::daxctl_region_get_first(self.0.as_ptr());
            while !region.is_null() {
                let mut device = declared::daxctl_dev_get_first(region);
                while !device.is_null() {
                    found.push(describe(region, device));
                    device = declared::daxctl_dev_get_next(device);
                }
                region = declared::daxctl_region_get_next(region);
            }
        }
        found
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: the only reference to the context; nothing of it is used any more.
        unsafe { declared::daxctl_unref(self.0.as_ptr()) };
    }
}

/// # Safety
///
/// The device is one of the region's, whose context is there.
unsafe fn describe(region: *mut daxctl_region, device: *mut daxctl_dev) -> DaxDevice {
    // SAFETY: these read the device, which is there.
    let (enabled, memory, size, align, node, major, minor) = unsafe {
        (
            declared::daxctl_dev_is_enabled(device) != 0,
            declared::daxctl_dev_get_memory(device),
            declared::daxctl_dev_get_size(device),
            declared::daxctl_dev_get_align(device),
            declared::daxctl_dev_get_target_node(device),
            declared::daxctl_dev_get_major(device),
            declared::daxctl_dev_get_minor(device),
        )
    };
    // SAFETY: names that the device and the region own.
    let (name, place) = unsafe {
        (
            text(declared::daxctl_dev_get_devname(device)),
            text(declared::daxctl_region_get_path(region)),
        )
    };
    let mode = match (enabled, memory.is_null()) {
        (false, _) => DaxMode::Disabled,
        (true, false) => DaxMode::SystemRam,
        (true, true) => DaxMode::Devdax,
    };
    DaxDevice {
        name,
        mode,
        size,
        align,
        node: (node >= 0).then_some(node),
        namespace: namespace(Path::new(&place)),
        number: u32::try_from(major).ok().zip(u32::try_from(minor).ok()),
    }
}

/// The namespace of persistent memory that a region lies below, of which libdaxctl knows nothing.
fn namespace(region: &Path) -> Option<String> {
    let place = fs::canonicalize(region).ok()?;
    place
        .ancestors()
        .filter_map(|parent| fs::read_to_string(parent.join("namespace")).ok())
        .map(|text| text.trim().to_owned())
        .find(|text| !text.is_empty())
}

/// # Safety
///
/// The text is null or ends with a zero byte, and stays while this runs.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as the caller says.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}
