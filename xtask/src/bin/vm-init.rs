//! The first process of a virtual machine of `cargo xtask vm-test`: mounts what tests need, loads modules, runs the test
//! binaries one after the other, and ends the machine with what came of it.

use std::ffi::CString;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::process::Command;

/// The port of qemu's isa-debug-exit device: writing `n` ends qemu with the exit code `n * 2 + 1`.
const EXIT_PORT: u16 = 0xf4;

/// What test binaries find in their environment: `CULVERT_VM` says that nothing may be missing here. An emulated processor takes minutes for a thousand sessions, and for a
/// comparison of 24 MiB.
const ENVIRONMENT: [(&str, &str); 7] = [
    ("CULVERT_VM", "1"),
    ("PATH", "/bin"),
    ("HOME", "/tmp"),
    ("CI", "true"),
    ("RUST_BACKTRACE", "1"),
    ("CULVERT_SESSIONS", "24"),
    ("CULVERT_SESSIONS_MIB", "4"),
];

fn main() {
    // A panic would end the first process, and with it the kernel.
    let failed = std::panic::catch_unwind(run).unwrap_or(1);
    finish(u8::from(failed > 0));
}

/// Runs everything; returns how much failed.
fn run() -> usize {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("bpf", "/sys/fs/bpf"),
        ("cgroup2", "/sys/fs/cgroup"),
    ] {
        if let Err(error) = mount(kind, target) {
            println!("vm-init: mount {target}: {error}");
        }
    }
    // As everywhere else: service accounts are below it.
    if let Err(error) = fs::create_dir_all("/var").and_then(|()| std::os::unix::fs::symlink("/run", "/var/run")) {
        println!("vm-init: /var/run: {error}");
    }
    println!("vm-init: Linux {}", fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim());
    for module in fs::read_to_string("/modules.list").unwrap_or_default().lines() {
        match load_module(module) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => println!("vm-init: module {module}: {error}"),
        }
    }
    let mut failed = 0;
    failed += usize::from(!succeeds(Command::new("/bin/ip").args(["link", "set", "lo", "up"])));
    // One binary a line: its path, and its arguments, with tabs between them.
    for line in fs::read_to_string("/plan").unwrap_or_default().lines() {
        let mut words = line.split('\t');
        let Some(binary) = words.next() else { continue };
        println!("VM-TEST {binary}");
        failed += usize::from(!succeeds(Command::new(binary).args(words)));
    }
    failed
}

fn succeeds(command: &mut Command) -> bool {
    match command.envs(ENVIRONMENT).status() {
        Ok(status) if status.success() => true,
        Ok(status) => {
            println!("vm-init: {}: {status}", command.get_program().display());
            false
        }
        Err(error) => {
            println!("vm-init: {}: {error}", command.get_program().display());
            false
        }
    }
}

fn mount(kind: &str, target: &str) -> io::Result<()> {
    fs::create_dir_all(target)?;
    let (kind, target) = (CString::new(kind)?, CString::new(target)?);
    // SAFETY: strings that end with a zero, and no data.
    let result = unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn load_module(path: &str) -> io::Result<()> {
    let file = fs::File::open(path)?;
    // SAFETY: an open file, no parameters, no flags.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ends the machine. Whoever runs it believes the code only if the line that is printed says the same: a kernel that panics
/// ends qemu too.
fn finish(code: u8) -> ! {
    println!("VM-EXIT {code}");
    let _ = io::stdout().flush();
    // What was printed leaves the machine before it ends.
    // SAFETY: no memory is passed; a descriptor that is not open is an error.
    unsafe {
        libc::sync();
        libc::tcdrain(1);
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the process is root; the port is the machine's exit device, which takes one byte.
    unsafe {
        if libc::ioperm(EXIT_PORT.into(), 1, 1) == 0 {
            std::arch::asm!("out dx, al", in("dx") EXIT_PORT, in("al") code);
        }
    }
    // SAFETY: takes a number.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    loop {
        std::thread::park();
    }
}
