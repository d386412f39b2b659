//! What the running kernel and its set-up can do.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, FsType, statfs};

use super::error::InterceptError;

/// The magic number of the BPF file system (linux/magic.h).
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);
/// `SO_NETNS_COOKIE` (asm-generic/socket.h), not in libc for every target yet.
const SO_NETNS_COOKIE: nix::libc::c_int = 71;

/// The first release of each long-term series whose sockmap is free of the known use-after-free and stall bugs.
const SOCKMAP_FLOOR: [KernelVersion; 4] =
    [KernelVersion(6, 1, 183), KernelVersion(6, 6, 152), KernelVersion(6, 12, 104), KernelVersion(6, 18, 42)];
/// The first release with TCX links.
pub(super) const TCX_FLOOR: KernelVersion = KernelVersion(6, 6, 0);

/// A kernel release: major, minor, patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct KernelVersion(pub(super) u32, pub(super) u32, pub(super) u32);

impl std::fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl KernelVersion {
    /// The running kernel's.
    pub(super) fn running() -> io::Result<Self> {
        Self::of_release(&release())
    }

    /// Of a release's name.
    pub(super) fn of_release(release: &str) -> io::Result<Self> {
        Self::parse(release).ok_or_else(|| io::Error::other(format!("kernel release `{release}` is not a version")))
    }

    /// Reads `6.12.94+deb13-amd64` and the like. A missing patch number is 0.
    fn parse(release: &str) -> Option<Self> {
        let digits = release.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
        let mut numbers = digits.split('.').map(|number| number.parse().ok());
        Some(Self(numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
    }

    /// Whether sockmap can be trusted with payload: `Err` says why not.
    pub(super) fn has_sound_sockmap(self) -> Result<(), String> {
        let newest = SOCKMAP_FLOOR[SOCKMAP_FLOOR.len() - 1];
        let floor = SOCKMAP_FLOOR.iter().find(|floor| (floor.0, floor.1) == (self.0, self.1));
        let sound = match floor {
            Some(floor) => self >= *floor,
            None => self > newest,
        };
        if sound {
            return Ok(());
        }
        let floors: Vec<String> = SOCKMAP_FLOOR.iter().map(ToString::to_string).collect();
        Err(format!(
            "kernel {self} has known sockmap bugs; {} and what is newer than {newest} have not",
            floors.join(", ")
        ))
    }
}

/// The release of the running kernel, as it calls itself.
pub(super) fn release() -> String {
    nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

/// Whether programs at connect() and sendto() may choose the error of a call that they refuse (`bpf_set_retval`).
pub(super) fn hooks_choose_errors() -> bool {
    KernelVersion::running().is_ok_and(|running| running >= KernelVersion(6, 1, 0))
}

/// The cookie of the calling thread's network namespace.
pub(super) fn netns_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as nix::libc::socklen_t;
    // SAFETY: the option's value is a u64, and `length` says so.
    let result = unsafe {
        nix::libc::getsockopt(
            socket.as_raw_fd(),
            nix::libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Opens a cgroup v2 directory.
pub(super) fn open_cgroup(path: &Path) -> Result<OwnedFd, InterceptError> {
    let error = |reason: String| InterceptError::Cgroup { path: path.to_owned(), reason };
    let kind = statfs(path).map_err(|errno| error(format!("cannot be read: {errno}")))?.filesystem_type();
    if kind != CGROUP2_SUPER_MAGIC {
        return Err(error("is not a cgroup v2 directory; /proc/mounts shows where cgroup2 is mounted".to_owned()));
    }
    fs::File::open(path).map(OwnedFd::from).map_err(|source| error(format!("cannot be opened: {source}")))
}

/// Makes a directory on a BPF file system, mounting one on /sys/fs/bpf if the path lies there and none is.
pub(super) fn prepare_pin_path(path: &Path) -> Result<(), InterceptError> {
    const USUAL_MOUNT: &str = "/sys/fs/bpf";
    let error = |reason: String| InterceptError::PinPath { path: path.to_owned(), reason };
    let existing: PathBuf = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/")).to_owned();
    let on_bpf = |path: &Path| statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
    if !on_bpf(&existing) {
        if !path.starts_with(USUAL_MOUNT) {
            return Err(error(format!(
                "is not on a BPF file system; mount one (mount -t bpf bpf <directory>) or choose a path under {USUAL_MOUNT}"
            )));
        }
        nix::mount::mount(Some("bpf"), USUAL_MOUNT, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>).map_err(
            |errno| match errno {
                nix::Error::EPERM | nix::Error::EACCES => {
                    InterceptError::Permission { action: "mount a BPF file system" }
                }
                errno => {
                    error(format!("no BPF file system is mounted on {USUAL_MOUNT} and mounting one failed: {errno}"))
                }
            },
        )?;
        tracing::info!("mounted a BPF file system on {USUAL_MOUNT}");
    }
    fs::create_dir_all(path).map_err(|source| error(format!("cannot be created: {source}")))
}

/// Logs settings of the node that keep redirected packets from arriving. They belong to the node's set-up: nothing is
/// changed.
pub(super) fn log_hostile_sysctls(interface: &str) {
    let read = |name: &str, of: &str| {
        fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{of}/{name}"))
            .ok()
            .and_then(|text| text.trim().parse::<u32>().ok())
            .unwrap_or(0)
    };
    let either = |name| read(name, "all").max(read(name, interface));
    if either("src_valid_mark") != 0 && read("accept_local", "all").max(read("accept_local", interface)) == 0 {
        tracing::warn!(
            interface,
            "net.ipv4.conf.*.src_valid_mark is on: the kernel takes redirected packets for martians and drops them; \
             set it to 0, or accept_local to 1"
        );
    }
    if either("rp_filter") == 1 {
        tracing::warn!(
            interface,
            "net.ipv4.conf.*.rp_filter is strict: packets whose source is routed over another interface are dropped; \
             set it to 2 if pods or replies do not get through"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_are_read() {
        assert_eq!(KernelVersion::parse("6.12.94+deb13-amd64"), Some(KernelVersion(6, 12, 94)));
        assert_eq!(KernelVersion::parse("6.18.44-fc-v595"), Some(KernelVersion(6, 18, 44)));
        assert_eq!(KernelVersion::parse("5.15-custom"), Some(KernelVersion(5, 15, 0)));
        assert_eq!(KernelVersion::parse("7.2.0-rc1"), Some(KernelVersion(7, 2, 0)));
        assert_eq!(KernelVersion::parse("linux"), None);
    }

    #[test]
    fn the_short_cut_needs_a_kernel_with_the_sockmap_fixes() {
        for (version, sound) in [
            (KernelVersion(5, 10, 250), false),
            (KernelVersion(6, 1, 182), false),
            (KernelVersion(6, 1, 183), true),
            (KernelVersion(6, 8, 12), false),
            (KernelVersion(6, 12, 104), true),
            (KernelVersion(6, 17, 9), false),
            (KernelVersion(6, 18, 41), false),
            (KernelVersion(6, 18, 42), true),
            (KernelVersion(7, 2, 1), true),
        ] {
            assert_eq!(version.has_sound_sockmap().is_ok(), sound, "{version}");
        }
    }

    #[test]
    fn a_directory_that_is_no_cgroup_is_refused_in_words() {
        let error = open_cgroup(Path::new("/proc")).unwrap_err().to_string();
        assert!(error.contains("shortcut_cgroup /proc: is not a cgroup v2 directory"), "{error}");
        let error = open_cgroup(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(error.contains("cannot be read"), "{error}");
    }

    #[test]
    fn a_pin_path_outside_a_bpf_file_system_is_refused_in_words() {
        let error = prepare_pin_path(Path::new("/proc/culvert")).unwrap_err().to_string();
        assert!(error.contains("pin_path /proc/culvert: is not on a BPF file system"), "{error}");
    }
}
