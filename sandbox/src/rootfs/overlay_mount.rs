//! The last resort for overlays on kernels before 6.8: mount(2), whose options may be a page long.

use std::{ffi::CString, os::fd::OwnedFd, ptr};

use rustix::{
    fs::CWD,
    mount::{OpenTreeFlags, open_tree},
};

use super::RootfsError;
use crate::sys::check;

/// Options as one string, and the descriptors that it names.
#[derive(Debug)]
pub(super) struct Classic {
    pub text: String,
    pub read_only: bool,
    pub _open: Vec<OwnedFd>,
}

/// Mounts in a mount namespace that lives as long as this call, so that nothing can leak from it,
/// and takes the mount out as a detached clone.
pub(super) fn mount_classic(options: Classic, name: &str) -> Result<OwnedFd, RootfsError> {
    let failed = |source| RootfsError::Mount {
        doing: "mount",
        what: name.to_owned(),
        source,
    };
    let worker = move || -> std::io::Result<OwnedFd> {
        let text = CString::new(options.text)?;
        let flags = if options.read_only {
            libc::MS_RDONLY
        } else {
            0
        };
        // SAFETY: unshare and mount get valid strings; the thread ends with this closure, so no
        // other code sees its namespace.
        unsafe {
            check(libc::unshare(libc::CLONE_NEWNS).into())?;
            let private = libc::MS_REC | libc::MS_PRIVATE;
            check(
                libc::mount(
                    ptr::null(),
                    c"/".as_ptr(),
                    ptr::null(),
                    private,
                    ptr::null(),
                )
                .into(),
            )?;
            // /sys exists everywhere, and no option names anything below it.
            check(
                libc::mount(
                    c"overlay".as_ptr(),
                    c"/sys".as_ptr(),
                    c"overlay".as_ptr(),
                    flags,
                    text.as_ptr().cast(),
                )
                .into(),
            )?;
        }
        let tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        Ok(open_tree(CWD, "/sys", tree)?)
    };
    std::thread::spawn(worker)
        .join()
        .map_err(|_| failed(std::io::Error::other("the mounting thread ended early")))?
        .map_err(failed)
}
