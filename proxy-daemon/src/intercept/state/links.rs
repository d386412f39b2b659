//! The node's interfaces, addresses and routing.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::State;
use crate::intercept::attach::{self, Attachment, Direction, Method};
use crate::intercept::config::{InterceptionConfig, glob_matches};
use crate::intercept::error::InterceptError;
use crate::intercept::netlink::Link;
use crate::intercept::{kernel, node_addresses, probe};

/// Addresses of nobody (RFC 5737, RFC 3849): only a default route leads there.
const ELSEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

impl State {
    /// Makes marked packets be delivered to this host. A host without IPv6 goes without it.
    pub(super) fn add_routing(&mut self) -> Result<(), InterceptError> {
        for is_ipv6 in [false, true] {
            match self.add_routing_of(is_ipv6) {
                Ok(_) if self.routed.contains(&is_ipv6) => {}
                Ok(_) => self.routed.push(is_ipv6),
                Err((_, error)) if is_ipv6 && is_unsupported(&error) => {
                    tracing::warn!(%error, "this host has no IPv6: only IPv4 is redirected");
                }
                Err((action, error)) => return Err(InterceptError::netlink(action, error)),
            }
        }
        Ok(())
    }

    /// Likewise, of one address family; says whether anything was not there. An error comes with what was tried.
    fn add_routing_of(&mut self, is_ipv6: bool) -> Result<bool, (String, io::Error)> {
        let (mark, table) = (self.config.mark, self.config.route_table);
        let family = if is_ipv6 { "IPv6" } else { "IPv4" };
        let route = self.netlink.add_local_route(is_ipv6, table, self.loopback).map_err(|error| {
            (format!("add the {family} route `local default dev lo table {table}` (is lo up?)"), error)
        })?;
        let rule = self
            .netlink
            .add_rule(is_ipv6, mark, table)
            .map_err(|error| (format!("add the {family} routing rule `fwmark {mark:#x} lookup {table}`"), error))?;
        Ok(route || rule)
    }

    /// Makes the rule and the route again that others removed: without them, what is redirected goes astray. Returns what went wrong, if
    /// that is news; until it goes well it is one of the faults.
    pub(super) fn keep_routing(&mut self) -> Option<InterceptError> {
        if self.waits.is_some() || self.config.interfaces.is_empty() || self.is_followed() {
            return None;
        }
        let mut failed = None;
        for is_ipv6 in self.routed.clone() {
            match self.add_routing_of(is_ipv6) {
                Ok(true) => tracing::warn!(
                    family = if is_ipv6 { "IPv6" } else { "IPv4" },
                    mark = self.config.mark,
                    table = self.config.route_table,
                    "somebody had removed the routing rule or the route of interception: they are there again"
                ),
                Ok(false) => {}
                // Switched off, perhaps for a while.
                Err((_, error)) if is_ipv6 && is_unsupported(&error) => {}
                Err((action, error)) => failed = Some(InterceptError::netlink(action, error)),
            }
        }
        // What goes well the next time was no fault: the kernel may have been short of memory, or a signal came.
        let again = std::mem::replace(&mut self.routing_failed, failed.is_some());
        if failed.is_some() && !again {
            return None;
        }
        let fault = failed.as_ref().map(ToString::to_string);
        let known = std::mem::replace(&mut self.routing_fault, fault);
        failed.filter(|_| self.routing_fault != known)
    }

    /// What comes back from elsewhere in pods' names has to be steered where it comes in. Where uplinks are named and none is there, and what goes
    /// elsewhere leaves by an interface without the program, that is a fault: a misspelt or renamed interface would otherwise cost pods all
    /// that is not on the node. Without `original_src` none need be named.
    pub(super) fn look_at_uplinks(&mut self) {
        let attached = self.attachments.values().any(|attachment| attachment.direction == Direction::Inbound);
        let fault = match attached || self.waits.is_some() || !self.config.has_uplinks() || self.is_followed() {
            true => None,
            false => ELSEWHERE.into_iter().find_map(|address| {
                let index = self.netlink.route_to(address).ok()??;
                let leaves = !self.attachments.contains_key(&index) && index != self.loopback;
                let name = nix::net::if_::if_indextoname(index).ok().filter(|_| leaves)?;
                let name = name.to_string_lossy();
                Some(format!(
                    "uplinks: the default route leads over {name}, and none of {:?} is there: answers from elsewhere do not \
                     reach the daemon; name {name} in interception.uplinks",
                    self.config.uplinks
                ))
            }),
        };
        if fault != self.uplink_fault {
            if let Some(fault) = &fault {
                tracing::warn!("{fault}");
            }
            self.uplink_fault = fault;
        }
    }

    /// Attaches to, leaves alone, or detaches from an interface, as its name asks for.
    pub(in crate::intercept) fn reconcile_link(&mut self, link: &Link) -> Result<(), InterceptError> {
        if self.waits.is_some() || self.is_followed() {
            return Ok(());
        }
        let wanted = self.direction_on(link);
        // Before the program is there: what it redirects must get to this host.
        if let Err(error) = self.note_port(link, wanted.is_some()) {
            return self.note_unattached(link.index, error);
        }
        if let Some(attachment) = self.attachments.get_mut(&link.index) {
            if wanted == Some(attachment.direction) {
                if !attachment.is_on(&link.name) {
                    attachment.rename(&link.name);
                }
                self.unattached.remove(&link.index);
                return Ok(());
            }
            self.forget_link(link.index)?;
        }
        let Some(direction) = wanted else {
            self.unattached.remove(&link.index);
            return Ok(());
        };
        let attachment = match Attachment::new(&mut self.ebpf, link, direction, &self.method) {
            Ok(attachment) => attachment,
            // Interfaces come and go faster than events are read.
            Err(_) if nix::net::if_::if_nametoindex(link.name.as_str()).is_err() => return Ok(()),
            Err(error) => return self.note_unattached(link.index, error),
        };
        self.unattached.remove(&link.index);
        tracing::info!(interface = link.name, program = direction.program(), "attached");
        probe::log_hostile_sysctls(&link.name);
        self.attachments.insert(link.index, attachment);
        Ok(())
    }

    /// Which program an interface gets, if any. A pods' bridge gets none itself: its ports do, over which pods send to each other too.
    fn direction_on(&self, link: &Link) -> Option<Direction> {
        let named = direction_of(&self.config, &link.name);
        if link.is_bridge {
            return named.filter(|direction| *direction == Direction::Inbound);
        }
        named.or_else(|| {
            let bridge = nix::net::if_::if_indextoname(link.bridge?).ok()?;
            direction_of(&self.config, bridge.to_str().ok()?).filter(|direction| *direction == Direction::Outbound)
        })
    }

    /// Notes what keeps an interface from having its program: tried again until it works, and said once.
    fn note_unattached(&mut self, index: u32, error: InterceptError) -> Result<(), InterceptError> {
        let reason = error.to_string();
        let known = self.unattached.insert(index, reason.clone());
        if known == Some(reason) { Ok(()) } else { Err(error) }
    }

    /// Has packets that come over the port of a bridge, and are for the daemon, led to this host; forgets who is a port no longer.
    fn note_port(&mut self, link: &Link, has_program: bool) -> Result<(), InterceptError> {
        let address = link.address.filter(|_| link.bridge.is_some() && has_program);
        if self.bridge_ports.get(&link.index).copied() == address {
            return Ok(());
        }
        kernel::set_bridge_port(&mut self.ebpf, link.index, address)?;
        match address {
            Some(address) => self.bridge_ports.insert(link.index, address),
            None => self.bridge_ports.remove(&link.index),
        };
        Ok(())
    }

    /// An interface is gone: and with it the pod that it belonged to.
    pub(in crate::intercept) fn link_gone(&mut self, index: u32) -> Result<(), InterceptError> {
        if self.is_followed() {
            return Ok(());
        }
        self.unattached.remove(&index);
        if self.bridge_ports.remove(&index).is_some() {
            kernel::set_bridge_port(&mut self.ebpf, index, None)?;
        }
        // First of all what matters: it does not wait for a disk.
        let forgotten = self.forget_link(index);
        self.departed.extend(self.pods.leave(|home| home == index));
        if self.commanded.iter().all(|pod| pod.interface != index) {
            return forgotten;
        }
        let stay = self.commanded.iter().filter(|pod| pod.interface != index).cloned().collect();
        self.set_commanded(stay);
        forgotten.and(self.write_commanded(&self.commanded))
    }

    /// Detaches from an interface. One that moved to another network namespace took the program along, which must not
    /// work there.
    pub(in crate::intercept) fn forget_link(&mut self, index: u32) -> Result<(), InterceptError> {
        match self.attachments.remove(&index) {
            Some(attachment) => attachment.detach().map_err(InterceptError::Remove),
            None => Ok(()),
        }
    }

    /// All interfaces of the node.
    pub(super) fn links(&mut self) -> Result<Vec<Link>, InterceptError> {
        self.netlink.links().map_err(|source| InterceptError::netlink("list interfaces", source))
    }

    /// Notes which pods are gone, by all interfaces that there are: nothing tells of those that went while another daemon served.
    pub(super) fn leave_gone(&mut self, links: &[Link]) {
        let gone = self.pods.leave(|home| links.iter().all(|link| link.index != home));
        if !gone.is_empty() {
            self.departed.extend(gone);
            self.try_again_soon();
        }
    }

    pub(in crate::intercept) fn reconcile_all_links(&mut self) -> Result<(), InterceptError> {
        if self.waits.is_some() || self.is_followed() {
            return Ok(());
        }
        let links = self.links()?;
        self.leave_gone(&links);
        let known = self.attachments.keys().chain(self.bridge_ports.keys());
        let mut gone: Vec<u32> = known.copied().filter(|index| links.iter().all(|link| link.index != *index)).collect();
        gone.sort_unstable();
        gone.dedup();
        for index in gone {
            self.link_gone(index)?;
        }
        self.unattached.retain(|index, _| links.iter().any(|link| link.index == *index));
        for link in &links {
            self.reconcile_link(link)?;
        }
        if let Method::Tcx(directory) = &self.method {
            attach::remove_stale_pins(directory, |index| self.attachments.contains_key(&index))
                .map_err(|source| InterceptError::PinPath { path: directory.clone(), reason: source.to_string() })?;
        }
        Ok(())
    }

    pub(in crate::intercept) fn reconcile_addresses(&mut self) -> Result<(), InterceptError> {
        let addresses = self.netlink.addresses().map_err(|source| InterceptError::netlink("list addresses", source))?;
        node_addresses::note(&addresses);
        kernel::set_local_addresses(&mut self.ebpf, &addresses)
    }
}

/// Which program an interface of this name gets, if any.
pub(super) fn direction_of(config: &InterceptionConfig, name: &str) -> Option<Direction> {
    let any = |patterns: &[String]| patterns.iter().any(|pattern| glob_matches(pattern, name));
    if any(&config.interfaces) {
        Some(Direction::Outbound)
    } else if any(&config.uplinks) {
        Some(Direction::Inbound)
    } else {
        None
    }
}

/// Errors by which a kernel without an address family answers.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::EAFNOSUPPORT | nix::libc::EOPNOTSUPP | nix::libc::EPROTONOSUPPORT | nix::libc::EACCES)
    )
}
