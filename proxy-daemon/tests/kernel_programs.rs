//! Every program against the running kernel's verifier, and what is said to kernels that are too old.

use culvert_proxy_daemon::intercept::{self, HostMode, Interception, InterceptionConfig};

fn version() -> (u32, u32) {
    let release = nix::sys::utsname::uname().expect("uname").release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The programs of the short cut ask for what older kernels do not have: `bpf_get_netns_cookie` of a socket's events,
/// `bpf_ktime_get_coarse_ns`. There, they are not even tried: the short cut is off for the kernel's bugs, which is said at the
/// start, and hops use TCP.
const SHORT_CUT: (&[&str], (u32, u32)) = (&["register_socket", "shortcut"], (5, 15));

#[test]
fn every_program_passes_the_verifier() {
    let mut refused = intercept::refused_programs().expect("the maps are made");
    println!("refused by {:?}: {refused:#?}", version());
    let (programs, since) = SHORT_CUT;
    refused.retain(|(name, _)| version() >= since || !programs.contains(&name.as_str()));
    assert!(refused.is_empty(), "{}", refused.iter().map(|(name, why)| format!("{name}: {why}\n")).collect::<String>());
}

#[test]
fn a_kernel_that_is_too_old_is_told_so() {
    let config = InterceptionConfig {
        host: Some(HostMode::default()),
        pin_path: format!("/sys/fs/bpf/culvert-programs-{}", std::process::id()).into(),
        ..InterceptionConfig::default()
    };
    match Interception::start(config, 1) {
        Ok(interception) => {
            assert!(version() >= (5, 14));
            interception.shutdown().expect("shuts down");
        }
        Err(error) => {
            assert!(version() < (5, 14), "{error}");
            let (words, lines) = (error.to_string(), error.to_string().lines().count());
            assert!(words.starts_with("interception needs Linux 5.14, and this is 5."), "{error}");
            assert_eq!(lines, 1, "{error}");
        }
    }
}
