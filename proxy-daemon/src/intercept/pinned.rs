//! Pinned links, as far as aya has no calls for them: another program for a link, and the end of a link. Both are in force when
//! the call returns; a link of which only the pin is removed is detached some time later, in which both the old program and
//! its successor would see everything. And [`run`], for programs of which only a handle is there.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Of `enum bpf_cmd` (linux/bpf.h).
const BPF_OBJ_GET: i32 = 7;
const BPF_PROG_RUN: i32 = 10;
const BPF_LINK_UPDATE: i32 = 29;
const BPF_LINK_DETACH: i32 = 34;

/// Puts a loaded program in the place of that of a pinned link: whoever comes sees one of them, and never both or none.
///
/// # Errors
/// Nothing is pinned there; or what the link was attached to is gone; or the program is of another kind.
pub(super) fn update(pin: &Path, program: BorrowedFd<'_>) -> io::Result<()> {
    let link = open(pin)?;
    // Descriptors are not negative. The link, the program, no flags, whatever program it has.
    let mut attributes = [link.as_raw_fd().cast_unsigned(), program.as_raw_fd().cast_unsigned(), 0, 0];
    bpf(BPF_LINK_UPDATE, &mut attributes).map(drop)
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
    let _ = open(pin).and_then(|link| bpf(BPF_LINK_DETACH, &mut [link.as_raw_fd().cast_unsigned()]));
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
    let descriptor = bpf(BPF_OBJ_GET, &mut Get { path: path.as_ptr() as u64, descriptor: 0, flags: 0 })?;
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Runs a loaded program once that is a raw tracepoint's, with this as the tracepoint's one argument.
pub(super) fn run(program: BorrowedFd<'_>, argument: u64) -> io::Result<()> {
    /// The part of `union bpf_attr` for BPF_PROG_RUN, as far as such programs use it.
    #[repr(C)]
    #[derive(Default)]
    struct Run {
        program: u32,
        returned: u32,
        data_sizes: [u32; 2],
        data: [u64; 2],
        repeat: u32,
        duration: u32,
        arguments_size: u32,
        arguments_size_out: u32,
        arguments: u64,
        arguments_out: u64,
    }
    let arguments = [argument];
    let mut attributes = Run {
        program: program.as_raw_fd().cast_unsigned(),
        arguments_size: size_of_val(&arguments) as u32,
        arguments: arguments.as_ptr() as u64,
        ..Run::default()
    };
    bpf(BPF_PROG_RUN, &mut attributes).map(drop)
}

/// The attributes are a part of `union bpf_attr`, without padding.
fn bpf<T>(command: i32, attributes: &mut T) -> io::Result<i32> {
    let (pointer, size) = (std::ptr::from_mut(attributes), size_of::<T>() as u32);
    // SAFETY: as many bytes as said, which the kernel may read and write, and what they point to outlives the call.
    let result = unsafe { nix::libc::syscall(nix::libc::SYS_bpf, command, pointer, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
