//! An initramfs: a cpio archive (format "newc") with programs, the libraries that they need, and modules.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// The archive in the making.
#[derive(Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
    libraries: BTreeSet<PathBuf>,
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Initramfs {
    /// With the console that the first process writes to.
    pub fn new() -> Self {
        let mut archive = Self::default();
        archive.directories_of("dev/console");
        archive.entry("dev/console", CHARACTER_DEVICE, &[], (5, 1));
        archive
    }

    /// Adds a file.
    pub fn file(&mut self, name: &str, contents: &[u8]) {
        self.directories_of(name);
        self.entry(name, PROGRAM, contents, (0, 0));
    }

    /// Adds a program without what only debuggers need, and the libraries that it needs.
    pub fn program(&mut self, name: &str, path: &Path, scratch: &Path) -> Result<()> {
        let stripped = scratch.join("stripped");
        let status = Command::new("strip").args(["--strip-debug", "-o"]).arg(&stripped).arg(path).status();
        ensure!(status.context("running strip (binutils)")?.success(), "strip {} failed", path.display());
        let contents = fs::read(&stripped).with_context(|| format!("reading {}", stripped.display()))?;
        self.file(name, &contents);
        for library in libraries(path)? {
            if self.libraries.insert(library.clone()) {
                let contents = fs::read(&library).with_context(|| format!("reading {}", library.display()))?;
                self.file(library.to_string_lossy().trim_start_matches('/'), &contents);
            }
        }
        Ok(())
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn directories_of(&mut self, name: &str) {
        let parents: Vec<&Path> = Path::new(name).ancestors().skip(1).collect();
        for parent in parents.into_iter().rev().filter_map(Path::to_str).filter(|parent| !parent.is_empty()) {
            if self.directories.insert(parent.to_owned()) {
                self.entry(parent, DIRECTORY, &[], (0, 0));
            }
        }
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8], device: (u32, u32)) {
        self.entries += 1;
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, owner, group, links, time, size, the file system's device, the device itself, length of the name, sum.
        let (size, name_size) = (contents.len() as u32, name.len() as u32 + 1);
        for field in [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The shared libraries of a program, and what loads them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("running ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // `name => /path (0x…)`, or `/path (0x…)`. A static program has none.
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter_map(path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_and_directories_come_once() {
        let mut archive = Initramfs::new();
        archive.file("a/b/c", b"12345");
        archive.file("a/d", b"");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let mut at = 0;
        let mut names = Vec::new();
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |number: usize| {
                let digits = std::str::from_utf8(&bytes[at + 6 + number * 8..][..8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap() as usize
            };
            let (size, name_size) = (field(6), field(11));
            names.push(String::from_utf8(bytes[at + 110..at + 110 + name_size - 1].to_vec()).unwrap());
            at = (at + 110 + name_size).next_multiple_of(4);
            at = (at + size).next_multiple_of(4);
        }
        assert_eq!(names, ["dev", "dev/console", "a", "a/b", "a/b/c", "a/d", "TRAILER!!!"]);
    }
}
