//! Debian's kernels, downloaded once and kept under target/.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::progress;

/// Where the releases' kernels are. A list of our own: the system's may be another release's.
const SOURCES: &str = "\
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian-security bullseye-security main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian-security bookworm-security main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie-backports main
";

/// What tests need that kernels have as modules; one that a kernel does not have is built into it.
const MODULES: [&str; 14] = [
    "veth",
    "bridge",
    "8021q",
    "sch_ingress",
    "cls_bpf",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    // What other people's rules consist of.
    "nf_tables",
    "nft_chain_nat",
    "nft_nat",
    "nft_ct",
    "nft_counter",
    "nft_objref",
];

/// Which kernel of a series: its newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// `major.minor`
    Of(u32, u32),
    /// Whatever series is newest.
    Newest,
}

/// A kernel, unpacked.
pub struct Kernel {
    /// Its release, for example `6.1.0-56-cloud-amd64`.
    pub release: String,
    /// What boots.
    pub image: PathBuf,
    modules: PathBuf,
}

/// The kernels of these series. Downloads those that are not there.
pub fn ensure(root: &Path, series: &[Series]) -> Result<Vec<Kernel>> {
    let directory = root.join("target/vm");
    let apt = Apt::new(&directory)?;
    let names = apt.names()?;
    let mut kernels: Vec<Kernel> = Vec::new();
    for series in series {
        let name = newest(&names, *series).with_context(|| format!("Debian has no kernel of {series:?}"))?;
        if kernels.iter().any(|kernel| name.ends_with(&kernel.release)) {
            continue;
        }
        let unpacked = directory.join(name);
        if !unpacked.join("complete").exists() {
            let _ = fs::remove_dir_all(&unpacked);
            for package in parts(&names, name) {
                apt.unpack(package, &unpacked)?;
            }
            fs::write(unpacked.join("complete"), "")?;
        }
        kernels.push(Kernel::find(&unpacked)?);
    }
    Ok(kernels)
}

/// The package of a series' newest kernel.
fn newest(names: &BTreeSet<String>, series: Series) -> Option<&str> {
    let numbers = |name: &str| -> Option<Vec<u32>> {
        let version = name.strip_prefix("linux-image-")?.strip_suffix("-cloud-amd64")?;
        let version = version.split("+deb").next()?;
        version.split(['.', '-', '~']).map(|number| number.parse().ok()).collect()
    };
    let wanted = |numbers: &[u32]| match series {
        Series::Of(major, minor) => numbers.len() > 2 && numbers[..2] == [major, minor],
        Series::Newest => numbers.len() > 2,
    };
    let found = names.iter().filter_map(|name| Some((numbers(name)?, name)));
    found.filter(|(numbers, _)| wanted(numbers)).max().map(|(_, name)| name.as_str())
}

/// The packages that a kernel comes in: since 7.3 what boots and the modules are in packages of their own.
fn parts<'a>(names: &'a BTreeSet<String>, image: &'a str) -> Vec<&'a str> {
    let release = image.strip_prefix("linux-image-").unwrap_or_default();
    let others = ["binary", "modules"].map(|part| names.get(&format!("linux-{part}-{release}")).map(String::as_str));
    [Some(image)].into_iter().chain(others).flatten().collect()
}

/// apt, with lists and a cache of our own.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn new(directory: &Path) -> Result<Self> {
        for part in ["apt/state/lists/partial", "apt/cache/archives/partial"] {
            fs::create_dir_all(directory.join(part)).with_context(|| format!("creating {}", directory.display()))?;
        }
        fs::write(directory.join("apt/sources.list"), SOURCES)?;
        let apt = Self { directory: directory.to_owned() };
        // Kernels that are gone from the lists cannot be downloaded: once a day is often enough.
        let stamp = directory.join("apt/updated");
        let fresh = fs::metadata(&stamp).and_then(|data| data.modified()).ok().and_then(|time| time.elapsed().ok());
        if fresh.is_none_or(|age| age.as_secs() > 24 * 3600) {
            progress::run("reading Debian's lists of kernels", apt.command("apt-get").args(["update", "--quiet"]))?;
            fs::write(stamp, "")?;
        }
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let apt = self.directory.join("apt");
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::Etc::SourceList", apt.join("sources.list")),
            ("Dir::Etc::SourceParts", PathBuf::from("/dev/null")),
            ("Dir::State", apt.join("state")),
            ("Dir::State::status", PathBuf::from("/dev/null")),
            ("Dir::Cache", apt.join("cache")),
            ("APT::Sandbox::User", PathBuf::from("root")),
        ] {
            command.arg("-o").arg(format!("{option}={}", value.display()));
        }
        command
    }

    /// Every package of kernels.
    fn names(&self) -> Result<BTreeSet<String>> {
        let output = self.command("apt-cache").args(["pkgnames", "linux-"]).output().context("running apt-cache")?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
    }

    fn unpack(&self, name: &str, to: &Path) -> Result<()> {
        let downloads = self.directory.join("downloads");
        fs::create_dir_all(&downloads)?;
        let mut download = self.command("apt-get");
        download.args(["download", "--quiet", name]).current_dir(&downloads);
        progress::run(&format!("downloading {name}"), &mut download)?;
        let is_it = |path: &PathBuf| {
            let file = path.file_name().and_then(|file| file.to_str());
            file.is_some_and(|file| file.starts_with(&format!("{name}_")) && file.ends_with(".deb"))
        };
        let package = fs::read_dir(&downloads)?.flatten().map(|entry| entry.path()).find(is_it);
        let package = package.with_context(|| format!("{name} is not in {}", downloads.display()))?;
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("--extract").arg(&package).arg(to);
        progress::run(&format!("unpacking {name}"), &mut unpack)?;
        fs::remove_file(&package).with_context(|| format!("removing {}", package.display()))
    }
}

impl Kernel {
    fn find(unpacked: &Path) -> Result<Self> {
        // The second from 6.18 on.
        let parents = ["lib/modules", "usr/lib/modules"].map(|path| unpacked.join(path));
        let parent = parents.iter().find(|path| path.is_dir());
        let parent = parent.with_context(|| format!("{} has no modules", unpacked.display()))?;
        let entry = fs::read_dir(parent)?.next().with_context(|| format!("{} is empty", parent.display()))??;
        let release = entry.file_name().to_string_lossy().into_owned();
        let images = [unpacked.join(format!("boot/vmlinuz-{release}")), entry.path().join("vmlinuz")];
        let image = images.into_iter().find(|path| path.exists());
        let image = image.with_context(|| format!("{} has no kernel", unpacked.display()))?;
        Ok(Self { release, image, modules: entry.path() })
    }

    /// Major and minor number, and patch; Debian 12 and older do not tell that in the release.
    pub fn version(&self) -> (u32, u32, u32) {
        let version = self.release.split(['-', '+']).next().unwrap_or_default();
        let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        (next(), next(), next())
    }

    /// The modules that tests need, each with its name and after those that it needs.
    pub fn modules(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = Vec::new();
        find_modules(&self.modules, &mut files)?;
        let mut loaded = Vec::new();
        for name in MODULES {
            load(name, &files, &mut loaded)?;
        }
        Ok(loaded)
    }
}

fn load(name: &str, files: &[PathBuf], loaded: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    if loaded.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    // Built in, unless there is a file.
    let Some(path) = files.iter().find(|path| module_name(path).as_deref() == Some(name)) else { return Ok(()) };
    let contents = if path.extension().is_some_and(|extension| extension == "xz") {
        let output = Command::new("xz").arg("-dc").arg(path).output().context("running xz (xz-utils)")?;
        ensure!(output.status.success(), "xz cannot read {}", path.display());
        output.stdout
    } else {
        fs::read(path).with_context(|| format!("reading {}", path.display()))?
    };
    for needed in needs(&contents) {
        load(&needed, files, loaded)?;
    }
    loaded.push((name.to_owned(), contents));
    Ok(())
}

/// The names that a module says it depends on, in its section `.modinfo`.
fn needs(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let rest = &module[at + KEY.len()..];
    let names = rest.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(names).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(name.replace('-', "_"))
}

fn find_modules(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("reading {}", directory.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find_modules(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series_is_found() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-57-cloud-amd64-dbg",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.99+deb12-cloud-amd64",
            "linux-image-6.12-cloud-amd64",
            "linux-image-cloud-amd64",
            "linux-image-7.2.3+deb13-cloud-amd64",
        ];
        let names = names.map(str::to_owned).into();
        assert_eq!(newest(&names, Series::Of(6, 1)), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(newest(&names, Series::Of(6, 12)), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(newest(&names, Series::Newest), Some("linux-image-7.2.3+deb13-cloud-amd64"));
        assert_eq!(newest(&names, Series::Of(5, 10)), None);
    }

    #[test]
    fn what_a_module_needs_is_read_from_it() {
        assert_eq!(needs(b"\x7fELF..\0license=GPL\0depends=inet_diag,udp\0retpoline=Y\0"), ["inet_diag", "udp"]);
        assert!(needs(b"\0depends=\0").is_empty());
        assert!(needs(b"none").is_empty());
    }
}
