//! Files that are named in configuration: a pipe or a device in their place must not hold anybody up.

use std::fs::{File, OpenOptions};
use std::io::{Error, Result};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Opens a file to be read.
///
/// # Errors
/// What the system says, or that it is not a regular file (or a link to one).
pub fn open(path: &Path) -> Result<File> {
    // Without this, to open a pipe is to wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(Error::other("it is not a regular file"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_and_a_device_are_refused_at_once() {
        let pipe = std::env::temp_dir().join(format!("culvert-pipe-{}", std::process::id()));
        let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
        // SAFETY: the name ends with a zero byte.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let refused = open(&pipe).unwrap_err().to_string();
        std::fs::remove_file(&pipe).unwrap();
        assert_eq!(refused, "it is not a regular file");
        assert_eq!(open(Path::new("/dev/zero")).unwrap_err().to_string(), "it is not a regular file");
        assert!(open(Path::new("/proc/self/exe")).is_ok(), "a link to a file is one");
    }
}
