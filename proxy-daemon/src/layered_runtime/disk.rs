//! `disk_layer`: a directory whose files are keys (`a/b` is `a.b`) and whose contents are values.

use std::{
    fs,
    path::{Path, PathBuf},
};

use culvert_xds_client::regular_file;

use super::{Entry, slots::Values};

/// Directories below each other, as in Envoy.
const MAX_DEPTH: u32 = 16;
/// Bytes of one file. Values are short; what is longer is no value.
const MAX_FILE: u64 = 1 << 20;
/// Files of one layer.
const MAX_FILES: usize = 100_000;

/// Where a disk layer's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskLayer {
    /// A symbolic link that is swapped to change all values at once.
    pub symlink_root: PathBuf,
    /// Below it: the layer's files; `append_service_cluster` is part of it.
    pub subdirectory: PathBuf,
}

impl DiskLayer {
    /// The values; `None` where the directory does not exist.
    ///
    /// # Errors
    /// What could not be read, or is no value: the whole layer is left out then.
    pub(super) fn read(&self) -> Result<Option<Values>, String> {
        let root = self.symlink_root.join(&self.subdirectory);
        if !root.is_dir() {
            return Ok(None);
        }
        let mut values = Values::new();
        walk(&root, "", 1, &mut values)?;
        Ok(Some(values))
    }
}

fn walk(directory: &Path, prefix: &str, depth: u32, values: &mut Values) -> Result<(), String> {
    let fail = |error: std::io::Error| format!("{}: {error}", directory.display());
    if depth > MAX_DEPTH {
        return Err(format!("Walk recursion depth exceeded {MAX_DEPTH}"));
    }
    let real = directory.canonicalize().map_err(fail)?;
    if ["/dev", "/proc", "/sys"].iter().any(|system| real.starts_with(system)) {
        return Err(format!("Invalid path: {}", directory.display()));
    }
    for entry in fs::read_dir(directory).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let key = if prefix.is_empty() { name.into_owned() } else { format!("{prefix}.{name}") };
        let kind = fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if kind.is_dir() {
            walk(&path, &key, depth + 1, values)?;
        } else if kind.is_file() {
            if values.len() >= MAX_FILES {
                return Err(format!("{}: more than {MAX_FILES} files", directory.display()));
            }
            let value = read(&path).and_then(|text| Entry::from_text(&without_comments(&text)));
            values.insert(key, value.map_err(|error| format!("{}: {error}", path.display()))?);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, String> {
    let bytes = regular_file::read(path, MAX_FILE).map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Drops lines that begin with `#`, empty lines, and white space at the end.
fn without_comments(text: &str) -> String {
    let mut value = String::with_capacity(text.len());
    let mut lines = text.split('\n').filter(|line| !line.is_empty()).peekable();
    while let Some(line) = lines.next() {
        let last = lines.peek().is_none();
        if line.starts_with('#') {
            continue;
        }
        value.push_str(if last { line.trim_end() } else { line });
        if !last {
            value.push('\n');
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_empty_lines_are_no_value() {
        for (file, value) in [
            ("5\n", "5"),
            ("# comment\nhello world  \n", "hello world"),
            ("# only\n", ""),
            ("a\n\nb\n#c", "a\nb\n"),
            ("", ""),
        ] {
            assert_eq!(without_comments(file), value, "{file:?}");
        }
    }
}
