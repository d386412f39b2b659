//! Removes all that a daemon left behind, without a daemon.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::programs::TcAttachType;
use aya::programs::tc::{TcError, qdisc_detach_program};

use super::attach::Direction;
use super::error::{InterceptError, chain};
use super::lease::Lease;
use super::netlink::{Link, Netlink};
use super::pinned;

/// Removes programs, pins, the rule and the route, and queueing disciplines that are empty afterwards, in the calling
/// thread's network namespace. The result tells each thing that was removed, one line each.
///
/// # Errors
/// A daemon works with the pin path; or something cannot be removed: what can be is removed all the same.
pub fn clean(pin_path: &Path, mark: u32, route_table: u32) -> Result<Vec<String>, InterceptError> {
    let netlink = |action: &str| {
        let action = action.to_owned();
        move |source| InterceptError::netlink(action, source)
    };
    if pin_path.exists() {
        let lease = Lease::take(pin_path)
            .map_err(|source| InterceptError::PinPath { path: pin_path.to_owned(), reason: source.to_string() })?;
        if !lease.is_held() {
            return Err(InterceptError::InUse { path: pin_path.to_owned() });
        }
    }
    let mut requests = Netlink::open().map_err(netlink("open a netlink socket"))?;
    let links = requests.links().map_err(netlink("list interfaces"))?;
    let mut removed = Vec::new();
    let mut failures = Vec::new();
    // Programs first: without rule and route, what they redirect would go astray.
    remove_tree(pin_path, &links, &mut removed, &mut failures);
    for link in &links {
        remove_filters(&mut requests, link, &mut removed, &mut failures);
    }
    let loopback = links.iter().find(|link| link.name == "lo").map_or(1, |link| link.index);
    for is_ipv6 in [false, true] {
        let family = if is_ipv6 { "IPv6" } else { "IPv4" };
        match requests.delete_rule(is_ipv6, mark, route_table) {
            Ok(true) => removed.push(format!("{family} rule fwmark {mark:#x} lookup {route_table}")),
            Ok(false) => {}
            Err(error) => failures.push(format!("{family} rule of mark {mark:#x}: {error}")),
        }
        match requests.delete_local_route(is_ipv6, route_table, loopback) {
            Ok(true) => removed.push(format!("{family} route local default dev lo table {route_table}")),
            Ok(false) => {}
            Err(error) => failures.push(format!("{family} route of table {route_table}: {error}")),
        }
    }
    if failures.is_empty() { Ok(removed) } else { Err(InterceptError::Remove(failures.join("; "))) }
}

/// Removes pins, and with them what they hold, and then their directories.
fn remove_tree(path: &Path, links: &[Link], removed: &mut Vec<String>, failures: &mut Vec<String>) {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return failures.push(format!("{}: {error}", path.display())),
        Ok(entries) => entries,
    };
    for entry in entries.filter_map(Result::ok) {
        let path: PathBuf = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&path, links, removed, failures);
            continue;
        }
        match pinned::remove(&path) {
            Ok(()) => removed.push(named(&path, links)),
            Err(error) => failures.push(format!("{}: {error}", path.display())),
        }
    }
    match fs::remove_dir(path) {
        Ok(()) => removed.push(format!("directory {}", path.display())),
        Err(error) => failures.push(format!("{}: {error}", path.display())),
    }
}

/// A pin, as people know it: links of interfaces are named after the interface.
fn named(path: &Path, links: &[Link]) -> String {
    let of_links = path.parent().is_some_and(|parent| parent.ends_with("links"));
    let index: Option<u32> = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
    match index.filter(|_| of_links) {
        Some(index) => match links.iter().find(|link| link.index == index) {
            Some(link) => format!("program on {} ({})", link.name, path.display()),
            None => format!("program on an interface that is gone ({})", path.display()),
        },
        None => format!("pin {}", path.display()),
    }
}

/// Removes our filters, and the queueing discipline that held them if it holds no others.
fn remove_filters(requests: &mut Netlink, link: &Link, removed: &mut Vec<String>, failures: &mut Vec<String>) {
    let mut found = false;
    for direction in [Direction::Outbound, Direction::Inbound] {
        match qdisc_detach_program(&link.name, TcAttachType::Ingress, direction.program()) {
            Ok(()) => {
                found = true;
                removed.push(format!("filter {} on {}", direction.program(), link.name));
            }
            // None, or no queueing discipline that could hold any.
            Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::debug!(interface = link.name, error = chain(&error), "no filters can be listed"),
        }
    }
    if !found {
        return;
    }
    match requests.delete_empty_clsact(link.index) {
        Ok(true) => removed.push(format!("clsact queueing discipline of {}", link.name)),
        Ok(false) => {}
        Err(error) => failures.push(format!("clsact of {}: {error}", link.name)),
    }
}
