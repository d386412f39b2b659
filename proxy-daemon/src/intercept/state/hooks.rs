//! The programs on cgroups, and the cgroups of host mode that are enrolled by command.

use std::path::{Path, PathBuf};

use super::State;
use super::removal::remove_pinned_in;
use crate::intercept::CgroupStatus;
use crate::intercept::cgroups::{self, Hooks, Role, is_cgroup};
use crate::intercept::commanded;
use crate::intercept::config::{FailurePolicy, nests};
use crate::intercept::connect_config::cgroup;
use crate::intercept::error::InterceptError;
use crate::intercept::{kernel, sessions};

impl State {
    /// Loads the programs for cgroups, and attaches those of host mode, unless an earlier daemon's stay for now.
    pub(super) fn load_hooks(&mut self) -> Result<(), InterceptError> {
        if !self.config.has_hooks() {
            // What an earlier daemon with another configuration left.
            return remove_pinned_in(&self.config.pin_path.join("cgroups"));
        }
        kernel::note_daemon(&mut self.ebpf)?;
        let host = self.host_cgroups().map(|cgroups| (Role::Host, cgroups));
        let balance = self.config.balancing.as_ref().map(|it| (Role::Balance, it.cgroups.clone()));
        let pins = self.config.pin_path.join("cgroups");
        for (role, cgroups) in host.into_iter().chain(balance) {
            self.hooks.push(Hooks::load(&mut self.ebpf, role, &cgroups, pins.clone())?);
        }
        for role in [Role::Host, Role::Balance] {
            if self.hooks.iter().all(|hooks| hooks.role() != role) {
                // What an earlier daemon with another configuration left.
                cgroups::remove_pins_of(role, &pins)?;
            }
        }
        let (_, mut errors) = self.reconcile_cgroups();
        if let Some(error) = errors.pop() {
            return Err(error);
        }
        let missing = |hooks: &&Hooks| hooks.role() == Role::Host && hooks.len() == 0 && !hooks.patterns().is_empty();
        for hooks in self.hooks.iter().filter(missing).filter(|_| self.waits.is_none()) {
            tracing::warn!(patterns = ?hooks.patterns(), "no cgroup of host mode is there yet");
        }
        Ok(())
    }

    /// Attaches to the cgroups that are there now, where an earlier daemon's programs are not to stay for now. Returns
    /// where others may appear, also where it is too early to attach, and what could not be done and was not said yet.
    pub(in crate::intercept) fn reconcile_cgroups(&mut self) -> (Vec<PathBuf>, Vec<InterceptError>) {
        let (mut parents, mut errors) = (Vec::new(), Vec::new());
        let (balances, redirects) = (self.balances, self.waits.is_none());
        let is_due = |role: Role| match role {
            Role::Host => redirects,
            Role::Balance => balances,
        };
        let followed = self.is_followed();
        let mut all_due = redirects && self.took_over;
        for hooks in &mut self.hooks {
            if followed || !is_due(hooks.role()) {
                parents.extend(hooks.parents());
                all_due = false;
                continue;
            }
            let (more, failed) = hooks.reconcile(&mut self.ebpf);
            parents.extend(more);
            errors.extend(failed);
        }
        self.carry_on(all_due);
        // Now that our programs choose: whoever is told connects again at once. Before, the earlier daemon's tables count, and
        // of a daemon that is followed the successor's.
        if balances && std::mem::take(&mut self.inherits_sockets) && !followed {
            sessions::end(self.services.stranded(&mut self.ebpf));
        }
        (parents, errors)
    }

    /// The cgroups of host mode: those of the configuration, and those that were enrolled by command. `None`: there is no host mode.
    pub(super) fn host_cgroups(&self) -> Option<Vec<PathBuf>> {
        let configured = &self.config.host.as_ref()?.cgroups;
        Some(configured.iter().chain(&self.commanded_cgroups).cloned().collect())
    }

    /// Reads what was enrolled by command. Without host mode nothing of it is in force, which is said.
    pub(super) fn recall_cgroups(&mut self) -> Result<(), InterceptError> {
        let path = &self.config.state_path;
        let read = commanded::read_cgroups(path);
        self.commanded_cgroups =
            read.map_err(|reason| InterceptError::StateFile { path: commanded::path_of_cgroups(path), reason })?;
        if self.config.host.is_none() {
            self.commanded_cgroups.iter().for_each(|cgroup| tracing::warn!("{}", without_host(cgroup)));
        }
        self.note_host_cgroups();
        Ok(())
    }

    /// The cgroups that were enrolled by command when there was host mode, where what has no policy of its own fails closed: that they
    /// go round the daemon now may be meant by nobody.
    pub(super) fn unhosted(&self) -> impl Iterator<Item = String> {
        let config = &self.config;
        let is_told = config.host.is_none() && config.policy.failure_policy == FailurePolicy::Closed;
        self.commanded_cgroups.iter().filter(move |_| is_told).map(|cgroup| without_host(cgroup))
    }

    pub(in crate::intercept) fn enrol_cgroup(&mut self, path: &str) -> Result<(), InterceptError> {
        let refuse = |reason: String| Err(InterceptError::Command(reason));
        if self.config.host.is_none() {
            let reason = "there is no host mode: the bootstrap's extension has no `host` (an empty one is enough)";
            return refuse(reason.to_owned());
        }
        let path = cgroup(path).map_err(InterceptError::Command)?;
        if !is_cgroup(&path) {
            return refuse(format!("{} is not a cgroup v2 directory", path.display()));
        }
        let mut balanced = self.config.balancing.iter().flat_map(|balancing| &balancing.cgroups);
        if let Some(other) = balanced.find(|other| nests(&other.to_string_lossy(), &path.to_string_lossy())) {
            return refuse(format!(
                "{} and {} of balancing.cgroups are the same, or one below the other: a process has one of the two",
                path.display(),
                other.display()
            ));
        }
        if self.commanded_cgroups.contains(&path) {
            return Ok(());
        }
        let before = self.commanded_cgroups.clone();
        let wanted = before.iter().chain([&path]).cloned().collect();
        self.command_cgroups(wanted)?;
        let mut host = self.hooks.iter().filter(|hooks| hooks.role() == Role::Host);
        if let Some(fault) = host.find_map(|hooks| hooks.fault_of(&path)).cloned() {
            self.command_cgroups(before)?;
            return refuse(fault);
        }
        Ok(())
    }

    /// Takes out a cgroup that was enrolled by command. What its processes have open goes on.
    pub(super) fn unenrol_cgroup(&mut self, path: &Path) -> Result<(), InterceptError> {
        let mut wanted = self.commanded_cgroups.clone();
        wanted.retain(|cgroup| cgroup != path);
        if wanted.len() == self.commanded_cgroups.len() {
            let reason =
                format!("{} was not enrolled by command: `culvert status --node` lists what is", path.display());
            return Err(InterceptError::Command(reason));
        }
        self.command_cgroups(wanted)
    }

    /// Writes down and puts in force. What cannot be written down is not put in force.
    fn command_cgroups(&mut self, wanted: Vec<PathBuf>) -> Result<(), InterceptError> {
        self.may_command()?;
        let path = &self.config.state_path;
        commanded::write_cgroups(path, &wanted).map_err(|error| InterceptError::StateFile {
            path: commanded::path_of_cgroups(path),
            reason: error.to_string(),
        })?;
        self.commanded_cgroups = wanted;
        self.note_host_cgroups();
        // What goes wrong is one of the faults.
        self.reconcile_cgroups();
        Ok(())
    }

    /// Has the next look go by what is enrolled now.
    fn note_host_cgroups(&mut self) {
        let Some(wanted) = self.host_cgroups() else { return };
        if let Some(hooks) = self.hooks.iter_mut().find(|hooks| hooks.role() == Role::Host) {
            hooks.set_patterns(wanted);
        }
    }

    /// The cgroups that have programs, and those that were enrolled by command and have not.
    pub(in crate::intercept) fn cgroups(&self) -> Vec<CgroupStatus> {
        let mut found = Vec::new();
        for hooks in &self.hooks {
            found.extend(hooks.cgroups().into_iter().map(|cgroup| CgroupStatus {
                by_command: hooks.role() == Role::Host && self.commanded_cgroups.contains(&cgroup),
                cgroup,
                role: hooks.role().name(),
                attached: true,
            }));
        }
        let host = Role::Host.name();
        for cgroup in &self.commanded_cgroups {
            if !found.iter().any(|other| other.role == host && other.cgroup == *cgroup) {
                found.push(CgroupStatus { cgroup: cgroup.clone(), role: host, by_command: true, attached: false });
            }
        }
        found
    }
}

/// Why a cgroup that was enrolled by command is not any more.
fn without_host(cgroup: &Path) -> String {
    format!(
        "cgroup {} was enrolled by command, and is not any more: the bootstrap's extension has no `host` now; unenroll it, or add \
         `host: {{}}`",
        cgroup.display()
    )
}
