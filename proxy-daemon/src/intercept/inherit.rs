//! What a daemon takes over of an earlier one's pinned maps, so that neither an upgrade nor a crash loses what people read
//! and what programs see: counters, pods' accounts, and what is kept of sockets that were led elsewhere.
//!
//! A map of the same layout and shape is used as it is, by both daemons while both run. Of another layout only the
//! counters are carried on, whose numbers are stable. All else begins anew.

use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{Map, MapData, MapError, MapInfo, PerCpuArray, PerCpuValues};
use culvert_proxy_ebpf::{LAYOUT, Reason};

use super::error::chain;
use super::kernel;
use super::state::map_directories;

/// What the programs counted.
pub(super) const COUNTERS: &str = "COUNTERS";
/// UDP sockets that the kernel has connected to backends.
pub(super) const CONNECTED: &str = "CONNECTED";

/// The maps that are taken over. All others a daemon fills by what it is told, or they belong to its own sockets.
const INHERITED: [&str; 6] = [COUNTERS, "POD_COUNTERS", "DETOURS", "CHOICES", "REPLIES", CONNECTED];

/// Where maps of this layout are pinned.
pub(super) fn maps_directory(pin_path: &Path) -> PathBuf {
    pin_path.join(format!("maps-{LAYOUT}"))
}

/// The pinned maps that may take the place of those of the same names that were just made.
pub(super) fn usable(fresh: &Ebpf, pin_path: &Path) -> Vec<(&'static str, PathBuf)> {
    let directory = maps_directory(pin_path);
    let mut usable = Vec::new();
    for name in INHERITED {
        let path = directory.join(name);
        // Fails where nothing is pinned.
        let Ok(pinned) = MapInfo::from_pin(&path) else { continue };
        match info(fresh, name) {
            Some(own) if shape(&own) == shape(&pinned) => usable.push((name, path)),
            Some(_) => {
                tracing::warn!(map = name, "an earlier daemon's map has another shape: what it held begins anew");
            }
            None => tracing::warn!(
                map = name,
                "what shape this daemon's own map has cannot be told: what an earlier daemon's held begins anew"
            ),
        }
    }
    usable
}

/// The counters of a daemon with maps of another layout, and how much of them was carried on.
pub(super) struct Carried {
    from: PerCpuArray<MapData, u64>,
    /// By number.
    taken: Vec<u64>,
}

/// Has the counters go on where those of a daemon with maps of another layout are now. What its programs count after this
/// [`Carried::add_more`] adds. To be called before any program is attached.
pub(super) fn carry_counters_on(ebpf: &mut Ebpf, pin_path: &Path) -> Option<Carried> {
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix("maps-")?.parse::<u32>().ok();
    // The first layout had no number.
    let newest = map_directories(pin_path).into_iter().max_by_key(|path| number(path));
    let from = newest.filter(|path| *path != maps_directory(pin_path))?;
    let carried = Carried::open(&from).and_then(|mut carried| carried.add(ebpf).map(|()| carried));
    match carried {
        Ok(carried) => {
            tracing::info!(
                from = %from.display(),
                to = LAYOUT,
                "maps of another layout: the kernel's counters go on, those of pods begin anew"
            );
            Some(carried)
        }
        Err(reason) => {
            tracing::warn!(from = %from.display(), to = LAYOUT, reason, "maps of another layout: all counters begin anew");
            None
        }
    }
}

impl Carried {
    fn open(directory: &Path) -> Result<Self, String> {
        let error = |error: MapError| chain(&error);
        let map = MapData::from_pin(directory.join(COUNTERS)).and_then(Map::from_map_data).map_err(error)?;
        let from = PerCpuArray::try_from(map).map_err(error)?;
        let taken = vec![0; from.len().min(Reason::SLOTS as u32) as usize];
        Ok(Self { from, taken })
    }

    /// Adds what was counted since the last time, to one CPU's slot: only sums are shown.
    fn add(&mut self, ebpf: &mut Ebpf) -> Result<(), String> {
        let error = |error: MapError| chain(&error);
        let mut counters: PerCpuArray<_, u64> = kernel::map(ebpf, COUNTERS).map_err(|error| error.to_string())?;
        for (number, taken) in (0..).zip(&mut self.taken) {
            let sum: u64 = self.from.get(&number, 0).map_err(error)?.iter().sum();
            let more = sum.saturating_sub(*taken);
            if more == 0 {
                continue;
            }
            let mut values: Vec<u64> = counters.get(&number, 0).map_err(error)?.to_vec();
            values.iter_mut().take(1).for_each(|first| *first += more);
            let values = PerCpuValues::try_from(values).map_err(|error| error.to_string())?;
            counters.set(number, values, 0).map_err(error)?;
            *taken = sum;
        }
        Ok(())
    }

    /// Adds what the earlier programs counted meanwhile: the map lives as long as one of them, or this, although its pin may be
    /// gone. (What ours count in the microseconds in which a number is written may be lost: the kernel has no addition for us.)
    pub(super) fn add_more(&mut self, ebpf: &mut Ebpf) {
        if let Err(reason) = self.add(ebpf) {
            tracing::warn!(reason, "what the earlier programs counted since this daemon's start is lost");
        }
    }
}

/// What the kernel says of a map of ours.
pub(super) fn info(ebpf: &Ebpf, name: &str) -> Option<MapInfo> {
    let data = match ebpf.map(name)? {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::PerCpuHashMap(data)
        | Map::SkStorage(data) => data,
        _ => return None,
    };
    data.info().ok()
}

/// What two maps have to have in common to be used by the same programs.
fn shape(info: &MapInfo) -> (Option<u32>, [u32; 4]) {
    let sizes = [info.key_size(), info.value_size(), info.max_entries(), info.map_flags()];
    (info.map_type().ok().map(|kind| kind as u32), sizes)
}
