//! `/tap` of the admin interface: a client says what is to be tapped, and gets that for as long as it stays.

use std::{
    collections::HashMap,
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use culvert_xds_client::json::{self, UnknownFields};
use envoy_types::pb::envoy::{
    admin::v3::TapRequest,
    config::tap::v3::output_sink::{Format, OutputSinkType},
};
use http_body::Frame;
use tokio::{
    sync::mpsc,
    time::{Sleep, sleep},
};

use super::{
    TapConfig, files, output,
    sink::{Taken, Target},
    tap_config,
};
use crate::config::{FieldError, parse};
use crate::http::filters::shared::{Kept, Shared};

/// Envoy's word for a client that comes while another one is there.
const ATTACHED: &str = "An attached /tap admin stream already exists. Detach it.";

/// A filter that taps what clients ask for.
#[derive(Debug)]
pub(super) struct Slot {
    /// Looked at by each stream.
    is_set: AtomicBool,
    config: ArcSwapOption<Shared<TapConfig>>,
}

/// The filters by their `config_id`, and the client.
#[derive(Debug, Default)]
struct Registry {
    slots: HashMap<String, Vec<Weak<Slot>>>,
    attached: Option<(String, Arc<Shared<TapConfig>>)>,
}

static REGISTRY: Mutex<Option<Registry>> = Mutex::new(None);

fn with<R>(change: impl FnOnce(&mut Registry) -> R) -> R {
    let mut registry: MutexGuard<'_, Option<Registry>> = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
    change(registry.get_or_insert_default())
}

impl Registry {
    fn forget_dead(&mut self) {
        self.slots.retain(|_, slots| {
            slots.retain(|slot| slot.strong_count() > 0);
            !slots.is_empty()
        });
    }

    /// The filters with this id.
    fn slots(&self, id: &str) -> impl Iterator<Item = Arc<Slot>> {
        self.slots.get(id).into_iter().flatten().filter_map(Weak::upgrade)
    }
}

impl Slot {
    /// A filter with this id. Where a client is there already, it taps for that.
    pub(super) fn register(id: &str) -> Arc<Slot> {
        let slot = Arc::new(Slot { is_set: AtomicBool::new(false), config: ArcSwapOption::empty() });
        with(|registry| {
            registry.forget_dead();
            registry.slots.entry(id.to_owned()).or_default().push(Arc::downgrade(&slot));
            if let Some((_, config)) = registry.attached.as_ref().filter(|(attached, _)| attached == id) {
                slot.set(Some(Arc::clone(config)));
            }
        });
        slot
    }

    /// What is to be tapped now.
    pub(super) fn current(&self) -> Option<Kept<TapConfig>> {
        self.is_set.load(Ordering::Relaxed).then(|| self.config.load().as_ref().map(|config| config.keep())).flatten()
    }

    fn set(&self, config: Option<Arc<Shared<TapConfig>>>) {
        self.is_set.store(config.is_some(), Ordering::Relaxed);
        self.config.store(config);
    }
}

/// Whether there is a filter that a client can configure: without one there is no `/tap`.
pub(crate) fn is_registered() -> bool {
    with(|registry| {
        registry.forget_dead();
        !registry.slots.is_empty()
    })
}

/// Has filters tap what a client asks for, in YAML or JSON.
///
/// # Errors
/// What is wrong with it, for the client.
pub(crate) fn attach(request: &[u8]) -> Result<Attached, String> {
    if with(|registry| registry.attached.is_some()) {
        return Err(ATTACHED.to_owned());
    }
    if request.is_empty() {
        return Err("/tap requires a JSON/YAML body".to_owned());
    }
    let text = json::text(request).map_err(|error| error.to_string())?;
    let request: TapRequest =
        json::read(text, json::Format::Yaml, UnknownFields::Reject).map_err(|error| error.to_string())?;
    json::validate(&request).map_err(|error| error.to_string())?;
    parse::support::check(&request, "").map_err(|error| error.to_string())?;
    let id = request.config_id;
    let unknown = || format!("Unknown config id '{id}'. No extension has registered with this id.");
    if with(|registry| registry.slots(&id).next().is_none()) {
        return Err(unknown());
    }
    let mut receiver = None;
    let proto = request.tap_config.unwrap_or_default();
    let mut buffered = None;
    let config = tap_config(&proto, "tap_config", |sink, path| {
        match sink {
            OutputSinkType::FilePerTap(sink) => return files(&sink.path_prefix, path),
            OutputSinkType::BufferedAdmin(sink) => {
                let timeout = parse::duration(sink.timeout, path, "timeout")?.filter(|timeout| !timeout.is_zero());
                buffered = Some(Buffered::new(usize::try_from(sink.max_traces).unwrap_or(usize::MAX), timeout));
            }
            OutputSinkType::StreamingAdmin(_) => {}
            _ => return Err(FieldError::unsupported(path)),
        }
        let (target, traces) = Target::admin();
        receiver = Some(traces);
        Ok(target)
    })
    .map_err(|error| error.to_string())?;
    let format = config.sink.format;
    let of_admin = receiver.is_some();
    if of_admin && matches!(format, Format::ProtoBinary | Format::ProtoText) {
        let path = "tap_config.output_config.sinks[0].format";
        let text = "admin output only supports JSON or length delimited proto formats";
        return Err(FieldError::new(path, text).to_string());
    }
    let config = Arc::new(Shared::new(config));
    with(|registry| {
        // Another client may have come meanwhile.
        if registry.attached.is_some() {
            return Err(ATTACHED.to_owned());
        }
        for slot in registry.slots(&id) {
            slot.set(Some(Arc::clone(&config)));
        }
        registry.attached = Some((id, config));
        Ok(())
    })?;
    Ok(Attached { traces: receiver, format, buffered, ready: Vec::new().into_iter(), ended: false })
}

/// `BufferedAdminSink`
struct Buffered {
    traces: Vec<Taken>,
    max: usize,
    timeout: Option<Pin<Box<Sleep>>>,
}

impl Buffered {
    fn new(max: usize, timeout: Option<Duration>) -> Buffered {
        Buffered { traces: Vec::new(), max, timeout: timeout.map(|timeout| Box::pin(sleep(timeout))) }
    }
}

/// What a client of `/tap` reads. The tap ends when it is dropped.
pub(crate) struct Attached {
    /// `None`: they go into files.
    traces: Option<mpsc::Receiver<Taken>>,
    format: Format,
    /// `None`: traces are sent as they come.
    buffered: Option<Buffered>,
    /// What was buffered, on its way to the client.
    ready: std::vec::IntoIter<Taken>,
    ended: bool,
}

impl Attached {
    /// Collects traces until there are enough, or the time is over.
    fn poll_buffered(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let (Some(buffered), Some(traces)) = (&mut self.buffered, &mut self.traces) else { return Poll::Ready(()) };
        while buffered.traces.len() < buffered.max {
            match traces.poll_recv(cx) {
                Poll::Ready(Some(trace)) => buffered.traces.push(trace),
                Poll::Ready(None) => break,
                Poll::Pending => match &mut buffered.timeout {
                    Some(timeout) => {
                        ready!(timeout.as_mut().poll(cx));
                        break;
                    }
                    None => return Poll::Pending,
                },
            }
        }
        self.ready = std::mem::take(&mut buffered.traces).into_iter();
        self.buffered = None;
        self.ended = true;
        Poll::Ready(())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        with(|registry| {
            let Some((id, _)) = registry.attached.take() else { return };
            for slot in registry.slots(&id) {
                slot.set(None);
            }
        });
    }
}

impl http_body::Body for Attached {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        ready!(this.poll_buffered(cx));
        let trace = match (this.ready.next(), this.ended, &mut this.traces) {
            (Some(trace), ..) => Some(trace),
            (None, true, _) => None,
            (None, false, Some(traces)) => ready!(traces.poll_recv(cx)),
            // The client stays for the tap to go on, and is told nothing.
            (None, false, None) => return Poll::Pending,
        };
        let format = this.format;
        Poll::Ready(trace.map(|trace| Ok(Frame::data(output::write(trace.into_trace(), format).into()))))
    }
}
