//! `access_log_flush_interval`: lines of a stream that is under way, written at intervals.

use std::{
    cell::RefCell,
    rc::Rc,
    time::{Duration, Instant},
};

use http::StatusCode;
use tokio::task::AbortHandle;

use super::{conn_manager::ConnState, logged::LogParts, request_stats::Counted, stream::Progress};
use crate::{
    access_log::ResponseFlags,
    upstream::{UpstreamInfo, WorkerHost},
};

/// What is known of a stream when one of its lines is written.
#[derive(Clone)]
pub(super) struct Told {
    pub(super) log: LogParts,
    pub(super) status: Option<StatusCode>,
    pub(super) flags: ResponseFlags,
    pub(super) details: Option<String>,
    pub(super) host: Option<Rc<WorkerHost>>,
    pub(super) upstream: Option<Rc<UpstreamInfo>>,
    pub(super) counted: Option<Rc<Counted>>,
}

/// The lines of one stream. They end when this is dropped.
pub(super) struct LiveLog {
    told: Rc<RefCell<Told>>,
    task: AbortHandle,
}

impl LiveLog {
    /// A line every `interval` from now on.
    pub(super) fn start(
        state: Rc<ConnState>,
        progress: Rc<Progress>,
        started: Instant,
        interval: Duration,
        told: Told,
    ) -> LiveLog {
        let told = Rc::new(RefCell::new(told));
        let known = Rc::clone(&told);
        let lines = async move {
            let mut ticks = tokio::time::interval(interval);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            // The first one is at once.
            ticks.tick().await;
            loop {
                ticks.tick().await;
                let told = known.borrow();
                let mut record = told.log.record(&state, &progress, started);
                record.log_type = "DownstreamPeriodic";
                record.response_code = told.status.map_or(0, |status| status.as_u16());
                record.response_flags = told.flags;
                record.response_code_details = told.details.as_deref();
                record.upstream_host = told.host.as_ref().map(|host| host.host.display());
                record.upstream_host_name = told.host.as_ref().map(|host| host.host.name());
                record.upstream_local_address = told.upstream.as_ref().and_then(|upstream| upstream.local);
                record.upstream_tls = told.upstream.as_ref().and_then(|upstream| upstream.tls.as_ref());
                record.upstream_connection_id = told.upstream.as_ref().map(|upstream| upstream.id);
                record.times.connect = told.upstream.as_ref().map(|upstream| upstream.times).unwrap_or_default();
                record.virtual_cluster = told.counted.as_ref().and_then(|counted| counted.virtual_cluster());
                let metadata = progress.metadata.borrow();
                record.metadata = metadata.as_deref();
                for access_log in &state.manager.access_logs {
                    access_log.write(&record);
                }
            }
        };
        LiveLog { told, task: tokio::task::spawn_local(lines).abort_handle() }
    }

    /// More is known.
    pub(super) fn tell(&self, told: Told) {
        self.told.replace(told);
    }
}

impl Drop for LiveLog {
    fn drop(&mut self) {
        self.task.abort();
    }
}
