//! Pinned links, as far as aya has no calls for them: another program for a link, and the end of a link. Both are in force when
//! the call returns; a link of which only the pin is removed is detached some time later, in which both the old program and
//! its successor would see everything.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Of `enum bpf_cmd` (linux/bpf.h).
const BPF_OBJ_GET: i32 = 7;
const BPF_LINK_UPDATE: i32 = 29;
const BPF_LINK_DETACH: i32 = 34;

/// Puts a loaded program in the place of that of a pinned link: whoever comes sees one of them, and never both or none.
///
/// # Errors
/// Nothing is pinned there; or what the link was attached to is gone; or the program is of another kind.
pub(super) fn update(pin: &Path, program: BorrowedFd<'_>) -> io::Result<()> {
    let link = open(pin)?;
    // Descriptors are not negative. The link, the program, no flags, whatever program it has.
    let attributes = [link.as_raw_fd().cast_unsigned(), program.as_raw_fd().cast_unsigned(), 0, 0];
    bpf(BPF_LINK_UPDATE, &attributes).map(drop)
}

/// Detaches a pinned link, and removes the pin. What is no link is only removed, and what is not there is no error.
pub(super) fn remove(pin: &Path) -> io::Result<()> {
    detach(pin);
    match fs::remove_file(pin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Detaches a pinned link at once. Best effort: without its pin it goes as well, later.
pub(super) fn detach(pin: &Path) {
    // Fails for what is no link, and on kernels before 5.9.
    let _ = open(pin).and_then(|link| bpf(BPF_LINK_DETACH, &[link.as_raw_fd().cast_unsigned()]));
}

fn open(pin: &Path) -> io::Result<OwnedFd> {
    /// The part of `union bpf_attr` for BPF_OBJ_GET.
    #[repr(C)]
    struct Get {
        path: u64,
        descriptor: u32,
        flags: u32,
    }
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let descriptor = bpf(BPF_OBJ_GET, &Get { path: path.as_ptr() as u64, descriptor: 0, flags: 0 })?;
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The attributes are a part of `union bpf_attr`, without padding; none of these commands writes to them.
fn bpf<T>(command: i32, attributes: &T) -> io::Result<i32> {
    let (pointer, size) = (std::ptr::from_ref(attributes), size_of::<T>() as u32);
    // SAFETY: as many bytes as said, and what they point to outlives the call.
    let result = unsafe { nix::libc::syscall(nix::libc::SYS_bpf, command, pointer, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
