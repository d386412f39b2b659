use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU32, Ordering},
};

use super::{Counter, Scope};

/// The lowest status code that is counted by itself.
const FIRST: u16 = 100;
/// One above the highest.
const END: u16 = 600;

/// Counters of responses: `<prefix>_completed`, `<prefix>_2xx`, and `<prefix>_200` where single codes are counted. Cheap to
/// clone.
#[derive(Debug, Clone)]
pub struct ResponseCodes(Arc<Codes>);

#[derive(Debug)]
struct Codes {
    scope: Scope,
    prefix: &'static str,
    completed: Counter,
    /// Slots of `1xx` to `5xx`; 0: not created yet.
    classes: [AtomicU32; 5],
    /// Slots of 100 to 599, made with the first response: most of thousands of clusters never see one. `None` where classes
    /// only are counted.
    codes: Option<OnceLock<Box<[AtomicU32]>>>,
}

impl ResponseCodes {
    /// Codes and classes, each created when it is first seen, as in clusters: `prefix` is for example `upstream_rq`.
    pub fn new(scope: &Scope, prefix: &'static str) -> ResponseCodes {
        ResponseCodes(Arc::new(Codes {
            scope: scope.clone(),
            prefix,
            completed: scope.counter(&format!("{prefix}_completed")),
            classes: Default::default(),
            codes: Some(OnceLock::new()),
        }))
    }

    /// Classes only, all there from the start, as in connection managers: `prefix` is for example `downstream_rq`.
    pub fn classes_only(scope: &Scope, prefix: &'static str) -> ResponseCodes {
        ResponseCodes(Arc::new(Codes {
            scope: scope.clone(),
            prefix,
            completed: scope.counter(&format!("{prefix}_completed")),
            classes: [1, 2, 3, 4, 5].map(|class| AtomicU32::new(scope.counter(&format!("{prefix}_{class}xx")).0)),
            codes: None,
        }))
    }

    /// Counts one response. The first one of a code locks the registry; the others do not. What is no status code counts
    /// as completed only.
    #[inline]
    pub fn inc(&self, code: u16) {
        self.0.completed.inc();
        if !(FIRST..END).contains(&code) {
            return;
        }
        let class = code / 100;
        self.0.count(&self.0.classes[usize::from(class) - 1], || format!("{class}xx"));
        if let Some(codes) = &self.0.codes {
            let codes = codes.get_or_init(|| (FIRST..END).map(|_| AtomicU32::new(0)).collect());
            self.0.count(&codes[usize::from(code - FIRST)], || code.to_string());
        }
    }
}

impl Codes {
    #[inline]
    fn count(&self, cell: &AtomicU32, suffix: impl FnOnce() -> String) {
        // Acquire and Release: who reads a slot must also see the chunk that was allocated for it.
        match cell.load(Ordering::Acquire) {
            0 => {
                let counter = self.scope.counter(&format!("{}_{}", self.prefix, suffix()));
                cell.store(counter.0, Ordering::Release);
                counter.inc();
            }
            slot => Counter(slot).inc(),
        }
    }
}
