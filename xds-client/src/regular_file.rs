//! Files that are named in configuration: a pipe or a device in their place must not hold anybody up.

use std::fs::{File, OpenOptions};
use std::io::{Error, Read as _, Result};
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

/// Reads a file of at most `limit` bytes.
///
/// # Errors
/// Those of [`open`], what the system says while it is read, or that it is larger.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more than may be: whatever the file's size is said to be, and files of /proc have none.
    open(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(Error::other(format!("it is larger than {limit} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit() {
        let file = std::env::temp_dir().join(format!("culvert-limit-{}", std::process::id()));
        std::fs::write(&file, "four").unwrap();
        let (whole, cut) = (read(&file, 4), read(&file, 3));
        std::fs::remove_file(&file).unwrap();
        assert_eq!(whole.unwrap(), b"four");
        assert_eq!(cut.unwrap_err().to_string(), "it is larger than 3 bytes");
        assert!(read(Path::new("/dev/zero"), u64::MAX).is_err());
    }

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
