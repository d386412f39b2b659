//! Attaches the programs that work when processes connect to cgroups: those that are there, and those that appear later.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use aya::Ebpf;
use aya::programs::links::{CgroupAttachMode, FdLink};
use aya::programs::{Program, ProgramError};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use notify::event::ModifyKind;
use notify::{EventKind, Watcher as _};

use super::config::glob_matches;
use super::error::{InterceptError, chain};
use super::pinned;
use super::state::State;

/// What programs are attached for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Connections of host processes go to the daemon.
    Host,
    /// Connections and datagrams to services go to backends.
    Balance,
}

impl Role {
    /// Its programs, in the order in which they are attached: those that change what others rely on come last.
    const fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Host => &["getpeername4", "getpeername6", "host_flow", "host_connect4", "host_connect6"],
            Self::Balance => &[
                "getpeername4",
                "getpeername6",
                "balance_released",
                "balance_recvmsg4",
                "balance_recvmsg6",
                "balance_sendmsg4",
                "balance_sendmsg6",
                "balance_connect4",
                "balance_connect6",
            ],
        }
    }

    /// The field of the extension that names the cgroups.
    const fn field(self) -> &'static str {
        match self {
            Self::Host => "host.cgroups",
            Self::Balance => "balancing.cgroups",
        }
    }

    /// For people, and in the names of pins.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Balance => "balance",
        }
    }
}

/// Loads a program of either role.
pub(super) fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<(), InterceptError> {
    let missing = || InterceptError::Load { name: name.to_owned(), reason: "not in the kernel object".to_owned() };
    let result = match ebpf.program_mut(name).ok_or_else(missing)? {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SockOps(program) => program.load(),
        _ => return Err(missing()),
    };
    match result {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(error) => Err(InterceptError::load(name, &error)),
    }
}

/// The cgroups that have the programs of one role.
pub(super) struct Hooks {
    role: Role,
    /// Absolute paths whose names may be globs.
    patterns: Vec<PathBuf>,
    /// Where links are pinned, as `<role>-<cgroup>-<program>`.
    pins: PathBuf,
    /// By the number of the cgroup's directory.
    attached: HashMap<u64, PathBuf>,
    /// What the last look could not do, by the cgroup, or the directory of the pins.
    faults: BTreeMap<PathBuf, String>,
}

impl Hooks {
    /// Loads the role's programs; attaches nothing.
    pub(super) fn load(
        ebpf: &mut Ebpf,
        role: Role,
        patterns: &[PathBuf],
        pins: PathBuf,
    ) -> Result<Self, InterceptError> {
        for name in role.programs() {
            load_program(ebpf, name)?;
        }
        for path in patterns.iter().filter(|path| path.exists()) {
            if !is_cgroup(path) {
                return Err(InterceptError::Hooks {
                    field: role.field(),
                    path: path.clone(),
                    reason: "is not a cgroup v2 directory; /proc/mounts shows where cgroup2 is mounted".to_owned(),
                });
            }
        }
        Ok(Self { role, patterns: patterns.to_vec(), pins, attached: HashMap::new(), faults: BTreeMap::new() })
    }

    /// Finds the cgroups that match now, and the directories in which such may appear.
    fn expand(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let (mut parents, mut found) = (Vec::new(), Vec::new());
        for pattern in &self.patterns {
            expand(pattern, &mut parents, &mut found);
        }
        (parents, found)
    }

    /// The directories in which matching cgroups may appear.
    pub(super) fn parents(&self) -> Vec<PathBuf> {
        self.expand().0
    }

    /// Attaches to the cgroups that match now, takes away what others have, and returns the directories in which matching
    /// cgroups may appear. Where an earlier daemon left programs, ours take their places: a cgroup is never without, and has both
    /// only where a link cannot be given another program, for a moment.
    /// Of the errors those are returned that are news; all are [`Self::faults`] until a look goes well.
    pub(super) fn reconcile(&mut self, ebpf: &mut Ebpf) -> (Vec<PathBuf>, Vec<InterceptError>) {
        let (parents, found) = self.expand();
        let (mut errors, mut faults) = (Vec::new(), BTreeMap::new());
        let mut fails = |place: &Path, error: InterceptError| {
            let fault = error.to_string();
            if self.faults.get(place) != Some(&fault) {
                errors.push(error);
            }
            faults.insert(place.to_owned(), fault);
        };
        let mut here = HashSet::new();
        for path in found.into_iter().filter(|path| is_cgroup(path)) {
            // It may be gone again.
            let Ok(number) = fs::metadata(&path).map(|data| data.ino()) else { continue };
            here.insert(number);
            if self.attached.contains_key(&number) {
                continue;
            }
            match self.attach(ebpf, &path, number) {
                Ok(()) => {
                    tracing::info!(cgroup = %path.display(), role = self.role.name(), "attached");
                    self.attached.insert(number, path);
                }
                Err(_) if !path.exists() => {}
                Err(reason) => {
                    let error = InterceptError::Hooks { field: self.role.field(), path: path.clone(), reason };
                    fails(&path, error);
                }
            }
        }
        self.attached.retain(|number, _| here.contains(number));
        if let Err(error) = self.remove_pins(|number| here.contains(&number)) {
            fails(&self.pins, InterceptError::PinPath { path: self.pins.clone(), reason: error.to_string() });
        }
        self.faults = faults;
        (parents, errors)
    }

    /// What the last look could not do, to be tried again.
    pub(super) fn faults(&self) -> impl Iterator<Item = &String> {
        self.faults.values()
    }

    /// Whether there is anything to try again.
    pub(super) fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    /// Why this cgroup does not have the programs, as of the last look.
    pub(super) fn fault_of(&self, cgroup: &Path) -> Option<&String> {
        self.faults.get(cgroup)
    }

    /// Has the next look attach everywhere, in the place of what another daemon attached meanwhile.
    pub(super) fn attach_anew(&mut self) {
        self.attached.clear();
    }

    /// What the programs are attached for.
    pub(super) fn role(&self) -> Role {
        self.role
    }

    /// Changes what is asked for, from the next look on.
    pub(super) fn set_patterns(&mut self, patterns: Vec<PathBuf>) {
        self.patterns = patterns;
    }

    /// The cgroups that have the programs, by their paths.
    pub(super) fn cgroups(&self) -> Vec<PathBuf> {
        let mut cgroups: Vec<PathBuf> = self.attached.values().cloned().collect();
        cgroups.sort();
        cgroups
    }

    /// What was asked for.
    pub(super) fn patterns(&self) -> &[PathBuf] {
        &self.patterns
    }

    /// How many cgroups have the programs.
    pub(super) fn len(&self) -> usize {
        self.attached.len()
    }

    fn attach(&self, ebpf: &mut Ebpf, path: &Path, number: u64) -> Result<(), String> {
        let cgroup = fs::File::open(path).map(OwnedFd::from).map_err(|error| error.to_string())?;
        for name in self.role.programs() {
            let pin = self.pins.join(format!("{}-{number}-{name}", self.role.name()));
            match replace(ebpf, name, &pin) {
                Ok(()) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::debug!(pin = %pin.display(), %error, "a link of an earlier daemon takes no other program: a new one is made")
                }
            }
            let link = attach(ebpf, name, &cgroup).map_err(|reason| format!("{name}: {reason}"))?;
            let fresh = self.pins.join(format!("{}-{number}-{name}-new", self.role.name()));
            let _ = fs::remove_file(&fresh);
            link.pin(&fresh).map_err(|error| format!("{}: {}", fresh.display(), chain(&error)))?;
            pinned::detach(&pin);
            fs::rename(&fresh, &pin).map_err(|error| format!("{}: {error}", pin.display()))?;
        }
        Ok(())
    }

    /// Removes the pins, and so the links, of cgroups that are not to be kept.
    fn remove_pins(&self, keep: impl Fn(u64) -> bool) -> io::Result<()> {
        let prefix = format!("{}-", self.role.name());
        for entry in fs::read_dir(&self.pins)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(&prefix)) else { continue };
            let kept = rest.split_once('-').and_then(|(number, program)| {
                let known = self.role.programs().contains(&program);
                number.parse().ok().filter(|number| known && keep(*number))
            });
            if kept.is_none() {
                pinned::remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Removes what an earlier daemon pinned for a role that is not wanted any more.
pub(super) fn remove_pins_of(role: Role, pins: &Path) -> Result<(), InterceptError> {
    let (patterns, attached, faults) = (Vec::new(), HashMap::new(), BTreeMap::new());
    let nobody = Hooks { role, patterns, pins: pins.to_owned(), attached, faults };
    let error = |error: io::Error| InterceptError::PinPath { path: pins.to_owned(), reason: error.to_string() };
    nobody.remove_pins(|_| false).map_err(error)
}

/// Puts a loaded program in the place of an earlier daemon's, in one step. With both, the earlier one would choose first, by
/// what its own daemon knew.
fn replace(ebpf: &Ebpf, name: &str, pin: &Path) -> io::Result<()> {
    let missing = || io::Error::other("not in the kernel object");
    let program = ebpf.program(name).ok_or_else(missing)?.fd().map_err(io::Error::other)?;
    pinned::update(pin, program.as_fd())
}

/// Attaches a loaded program.
fn attach(ebpf: &mut Ebpf, name: &str, cgroup: &OwnedFd) -> Result<FdLink, String> {
    // A link refuses flags; it stacks with other programs anyway.
    const MODE: CgroupAttachMode = CgroupAttachMode::Single;
    let error = |error: ProgramError| chain(&error);
    let link = match ebpf.program_mut(name).ok_or("not in the kernel object")? {
        Program::CgroupSockAddr(program) => {
            let id = program.attach(cgroup, MODE).map_err(error)?;
            program.take_link(id).map_err(error)?.try_into()
        }
        Program::CgroupSock(program) => {
            let id = program.attach(cgroup, MODE).map_err(error)?;
            program.take_link(id).map_err(error)?.try_into()
        }
        Program::SockOps(program) => {
            let id = program.attach(cgroup, MODE).map_err(error)?;
            program.take_link(id).map_err(error)?.try_into()
        }
        _ => return Err("not a program for cgroups".to_owned()),
    };
    link.map_err(|error| chain(&error))
}

pub(super) fn is_cgroup(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Finds the directories that a pattern names, and those in which such may appear.
fn expand(pattern: &Path, parents: &mut Vec<PathBuf>, found: &mut Vec<PathBuf>) {
    let mut here = vec![PathBuf::from("/")];
    for component in pattern.components() {
        let Component::Normal(name) = component else { continue };
        let name = name.to_string_lossy();
        let mut next = Vec::new();
        for directory in here {
            if name.contains(['*', '?']) {
                let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
                let matching = entries.filter(|entry| {
                    glob_matches(&name, &entry.file_name().to_string_lossy())
                        && entry.file_type().is_ok_and(|kind| kind.is_dir())
                });
                next.extend(matching.map(|entry| entry.path()));
            } else {
                let path = directory.join(&*name);
                next.extend(path.is_dir().then_some(path));
            }
            if is_cgroup(&directory) && !parents.contains(&directory) {
                parents.push(directory);
            }
        }
        here = next;
    }
    found.extend(here.into_iter().filter(|path| !found.contains(path)).collect::<Vec<_>>());
}

/// The thread that attaches to cgroups as they appear. Dropping it stops the thread.
pub(super) struct CgroupWatcher {
    wake: mpsc::Sender<Event>,
    thread: Option<JoinHandle<()>>,
}

enum Event {
    /// Cgroups may have appeared.
    Changed,
    /// These went, and with them their watches, if they had any.
    Gone(Vec<PathBuf>),
    /// Nobody knows what happened.
    Lost,
    Stop,
}

impl Event {
    /// What an event of a watched directory means, if it is a reason to look.
    fn of(event: notify::Result<notify::Event>) -> Option<Self> {
        let Ok(event) = event else { return Some(Self::Lost) };
        match event.kind {
            _ if event.need_rescan() => Some(Self::Lost),
            EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) => Some(Self::Gone(event.paths)),
            // Our own look causes the ones; the others are of what the kernel tells in the files of a cgroup.
            EventKind::Access(_) | EventKind::Modify(_) => None,
            _ => Some(Self::Changed),
        }
    }
}

impl CgroupWatcher {
    /// Starts the thread.
    pub(super) fn start(state: Arc<Mutex<State>>) -> Result<Self, InterceptError> {
        let failed = |reason: String| InterceptError::Load { name: "cgroups".to_owned(), reason };
        let (wake, events) = mpsc::channel();
        let changed = wake.clone();
        let watcher = notify::recommended_watcher(move |event| {
            if let Some(event) = Event::of(event) {
                // Nobody listens when the thread ends.
                let _ = changed.send(event);
            }
        })
        .map_err(|error| failed(format!("cannot be watched: {error}")))?;
        // The first look, which also says what to watch.
        let _ = wake.send(Event::Changed);
        let thread = std::thread::Builder::new()
            .name("intercept-cgrp".to_owned())
            .spawn(move || follow(watcher, &events, &state))
            .map_err(|error| failed(error.to_string()))?;
        Ok(Self { wake, thread: Some(thread) })
    }

    /// Has the thread look again.
    pub(super) fn look(&self) {
        // The thread ends with this.
        let _ = self.wake.send(Event::Changed);
    }
}

impl Drop for CgroupWatcher {
    fn drop(&mut self) {
        let _ = self.wake.send(Event::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watched cgroups had panicked");
        }
    }
}

fn follow(watcher: notify::RecommendedWatcher, events: &mpsc::Receiver<Event>, state: &Mutex<State>) {
    let mut watches = Watches { watcher, known: HashMap::new() };
    while let Ok(event) = events.recv() {
        // Many at once need one look.
        for event in std::iter::once(event).chain(events.try_iter()) {
            match event {
                Event::Changed => {}
                Event::Gone(paths) => paths.iter().for_each(|path| watches.forget(path)),
                Event::Lost => watches.forget_all(),
                Event::Stop => return,
            }
        }
        loop {
            let parents = {
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                let (parents, errors) = state.reconcile_cgroups();
                if !errors.is_empty() {
                    state.try_again_soon();
                }
                for error in errors {
                    tracing::warn!(%error, "interception does not follow a change of the cgroups");
                }
                parents
            };
            // What appeared before a watch did is seen by another look.
            if !watches.set(parents) {
                break;
            }
        }
    }
}

/// The directories that are watched.
struct Watches {
    watcher: notify::RecommendedWatcher,
    /// With the number of the directory that had the path then.
    known: HashMap<PathBuf, u64>,
}

impl Watches {
    /// Watches these directories and no others; returns whether any of them is watched anew. One that went and came again
    /// is: its watch went with it.
    fn set(&mut self, wanted: Vec<PathBuf>) -> bool {
        let numbered = |path: PathBuf| fs::metadata(&path).ok().map(|data| (path, data.ino()));
        let wanted: HashMap<PathBuf, u64> = wanted.into_iter().filter_map(numbered).collect();
        let stale: Vec<PathBuf> = self
            .known
            .iter()
            .filter(|(path, number)| wanted.get(*path) != Some(*number))
            .map(|(path, _)| path.clone())
            .collect();
        stale.iter().for_each(|path| self.forget(path));
        let mut is_new = false;
        for (path, number) in wanted {
            if self.known.contains_key(&path) {
                continue;
            }
            is_new = true;
            match self.watcher.watch(&path, notify::RecursiveMode::NonRecursive) {
                Err(error) if !path.exists() => {
                    tracing::debug!(%error, "a cgroup is gone");
                    continue;
                }
                Err(error) => {
                    // Said once, and not tried again and again.
                    tracing::warn!(cgroup = %path.display(), %error, "cgroups that appear here are not followed");
                }
                Ok(()) => {}
            }
            self.known.insert(path, number);
        }
        is_new
    }

    /// Has a directory watched anew, if it is wanted.
    fn forget(&mut self, path: &Path) {
        if self.known.remove(path).is_some() {
            // Fails where the watch is gone already.
            let _ = self.watcher.unwatch(path);
        }
    }

    fn forget_all(&mut self) {
        let known: Vec<PathBuf> = self.known.keys().cloned().collect();
        known.iter().for_each(|path| self.forget(path));
    }
}

#[cfg(test)]
#[path = "cgroups_tests.rs"]
mod tests;
