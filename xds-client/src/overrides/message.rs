//! The [`Overrides`] message: its bytes, and what it may hold.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;

use super::{
    Action, BAGGAGE_ITEM_NAME, ConfigValue, ContextError, Fault, MAX_CONFIG_NAME_BYTES, MAX_CONFIG_VALUE_BYTES,
    MAX_CONFIG_VALUES, MAX_OVERRIDES, Override, Overrides, VERSION, decode_base64, format_baggage, is_revision,
    is_service, is_share_token, shorten, split_service,
};

impl Overrides {
    /// A checked message of the current version from pairs of service and revision.
    ///
    /// # Errors
    /// Whatever [`Overrides::from_baggage_item`] would refuse on the receiving side.
    pub fn new<S: Into<String>, R: Into<String>>(
        entries: impl IntoIterator<Item = (S, R)>,
    ) -> Result<Self, ContextError> {
        let route = |(service, revision): (S, R)| Override {
            service: service.into(),
            revision: revision.into(),
            ..Override::default()
        };
        Self::of(entries.into_iter().map(route).collect(), 0)
    }

    /// A checked message of the current version. `expires`: seconds since 1970; 0: never.
    ///
    /// # Errors
    /// Whatever [`Overrides::from_baggage_item`] would refuse on the receiving side.
    pub fn of(overrides: Vec<Override>, expires: u64) -> Result<Self, ContextError> {
        let message = Self { version: VERSION, overrides, expires, ..Self::default() };
        message.check()?;
        Ok(message)
    }

    /// Decodes and checks the value of the baggage item `overrides`.
    ///
    /// # Errors
    /// [`ContextError`] with the part that is wrong; nothing of a message with an error in it is used.
    pub fn from_baggage_item(value: &str) -> Result<Self, ContextError> {
        Self::from_bytes(BAGGAGE_ITEM_NAME, &decode_base64(BAGGAGE_ITEM_NAME, value.as_bytes())?)
    }

    /// Decodes and checks a message.
    pub(super) fn from_bytes(what: &'static str, bytes: &[u8]) -> Result<Self, ContextError> {
        let message = Self::decode(bytes).map_err(|error| ContextError::Protobuf {
            what,
            message: "culvert.overrides.v1.Overrides",
            reason: error.to_string(),
        })?;
        message.check()?;
        Ok(message)
    }

    /// The value of the baggage item `overrides` that says this message.
    #[must_use]
    pub fn to_baggage_item(&self) -> String {
        STANDARD.encode(self.encode_to_vec())
    }

    /// What is said of `service`, which is given as `name.namespace`.
    #[must_use]
    pub fn of_service(&self, service: &str) -> Option<&Override> {
        let (name, namespace) = service.split_once('.')?;
        self.overrides.iter().find(|entry| split_service(&entry.service) == (name, namespace))
    }

    /// The revision that is wanted of `service`, which is given as `name.namespace`.
    #[must_use]
    pub fn revision_of(&self, service: &str) -> Option<&str> {
        self.of_service(service).map(|entry| &*entry.revision).filter(|revision| !revision.is_empty())
    }

    /// Whether it means nothing any more. `now`: seconds since 1970.
    #[must_use]
    pub fn is_expired(&self, now: u64) -> bool {
        self.expires != 0 && self.expires <= now
    }

    /// This message with the token of a share, which stands for what discovery keeps under it.
    ///
    /// # Errors
    /// When it is no token.
    pub fn with_share(mut self, token: impl Into<String>) -> Result<Self, ContextError> {
        self.share = token.into();
        self.check()?;
        Ok(self)
    }

    /// What this message says together with what its share stands for: of two entries for one service, this message's
    /// counts.
    ///
    /// # Errors
    /// When both together say too much.
    pub fn joined_with(&self, share: &Overrides) -> Result<Self, ContextError> {
        // Fields of one message after those of another: the later ones count, entries follow each other.
        let mut joined = share.clone();
        let taken = |entry: &Override| {
            self.overrides.iter().any(|own| split_service(&own.service) == split_service(&entry.service))
        };
        joined.overrides.retain(|entry| !taken(entry));
        // What was encoded a moment ago can be decoded.
        let _ = joined.merge(self.encode_to_vec().as_slice());
        joined.share = String::new();
        joined.check()?;
        Ok(joined)
    }

    /// Checks a message that a share stands for.
    ///
    /// # Errors
    /// What [`Self::from_baggage_item`] refuses, a share, and a signature: who may make shares vouches for them.
    pub fn check_shared(&self) -> Result<(), ContextError> {
        if !self.share.is_empty() {
            return Err(ContextError::NestedShare);
        }
        if self.signed.is_some() {
            return Err(ContextError::BadSigned("cannot be what a share stands for"));
        }
        self.check()
    }

    pub(super) fn check(&self) -> Result<(), ContextError> {
        if self.version != VERSION {
            return Err(ContextError::UnknownVersion(self.version));
        }
        if let Some(signed) = &self.signed {
            let alone = Self { version: VERSION, signed: Some(signed.clone()), ..Self::default() };
            if *self != alone {
                return Err(ContextError::BadSigned("has something beside it that is not signed"));
            }
            return signed.check();
        }
        if self.overrides.len() > MAX_OVERRIDES {
            return Err(ContextError::TooManyOverrides(self.overrides.len()));
        }
        if !self.share.is_empty() && !is_share_token(&self.share) {
            return Err(ContextError::BadShare(shorten(&self.share)));
        }
        let mut seen = BTreeSet::new();
        for (index, entry) in self.overrides.iter().enumerate() {
            entry.check(index)?;
            if !seen.insert(split_service(&entry.service)) {
                return Err(ContextError::DuplicateService(entry.service.clone()));
            }
        }
        Ok(())
    }
}

impl Override {
    /// What it asks for, in the order in which that is done.
    pub fn actions(&self) -> impl Iterator<Item = Action> + use<> {
        let asked = [
            (Action::Debug, self.debug),
            (Action::Sample, self.sample.is_some()),
            (Action::Config, !self.config.is_empty()),
            (Action::Timeout, self.timeout_ms != 0),
            (Action::Delay, self.delay_ms != 0),
            (Action::Fault, self.fault.is_some()),
            (Action::Route, !self.revision.is_empty() || !self.address.is_empty()),
        ];
        asked.into_iter().filter(|(_, asked)| *asked).map(|(action, _)| action)
    }

    /// The address that is wanted, and the port where that is said.
    #[must_use]
    pub fn wanted_address(&self) -> Option<(IpAddr, Option<u16>)> {
        match self.address.parse() {
            Ok(address) => Some((address, None)),
            Err(_) => self.address.parse().ok().map(|address: SocketAddr| (address.ip(), Some(address.port()))),
        }
    }

    /// The value of the header `x-culvert-config` that says its settings.
    #[must_use]
    pub fn config_header(&self) -> String {
        format_baggage(self.config.iter().map(|ConfigValue { name, value }| (&**name, &**value)))
    }

    /// What it asks for, for people.
    #[must_use]
    pub fn in_words(&self, action: Action) -> String {
        match action {
            Action::Route if self.revision.is_empty() => format!("address {}", self.address),
            Action::Route => format!("revision {}", self.revision),
            Action::Fault => match self.fault {
                Some(Fault { grpc_status: Some(status), .. }) => format!("answered with gRPC status {status}"),
                Some(Fault { http_status: Some(status), .. }) => format!("answered with status {status}"),
                _ => "answered".to_owned(),
            },
            Action::Delay => format!("delayed by {} ms", self.delay_ms),
            Action::Timeout => format!("{} ms for the answer", self.timeout_ms),
            Action::Debug => "logged".to_owned(),
            Action::Sample if self.sample == Some(true) => "trace recorded".to_owned(),
            Action::Sample => "trace not recorded".to_owned(),
            Action::Config => format!("told {}", self.config_header()),
            Action::Unspecified => String::new(),
        }
    }

    fn check(&self, index: usize) -> Result<(), ContextError> {
        let bad = |field, reason| Err(ContextError::BadField { index, field, reason });
        if !is_service(&self.service) {
            return Err(ContextError::BadService { index, service: shorten(&self.service) });
        }
        if self.actions().next().is_none() {
            return Err(ContextError::NothingAsked { index });
        }
        if !self.revision.is_empty() && !is_revision(&self.revision) {
            return Err(ContextError::BadRevision { index, revision: shorten(&self.revision) });
        }
        if !self.address.is_empty() {
            if !self.revision.is_empty() {
                return bad("address", "is there beside a revision");
            }
            if self.wanted_address().is_none_or(|(_, port)| port == Some(0)) {
                return bad("address", "is not an IP address, or an IP address with a port");
            }
        }
        match &self.fault {
            None => {}
            Some(Fault { http_status: Some(200..600), grpc_status: None })
            | Some(Fault { http_status: None, grpc_status: Some(0..=16) }) => {}
            Some(_) => return bad("fault", "is not one HTTP status (200 to 599) or one gRPC status (0 to 16)"),
        }
        if self.config.len() > MAX_CONFIG_VALUES {
            return bad("config", "has more than 16 settings");
        }
        let mut names = BTreeSet::new();
        for ConfigValue { name, value } in &self.config {
            let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
            if !(1..=MAX_CONFIG_NAME_BYTES).contains(&name.len()) || !name.bytes().all(known) {
                return bad("config", "has a name that is not 1 to 64 of a-z0-9-_.");
            }
            if value.len() > MAX_CONFIG_VALUE_BYTES || value.chars().any(char::is_control) {
                return bad("config", "has a value of more than 256 bytes, or with control characters");
            }
            if !names.insert(name) {
                return bad("config", "has a name twice");
            }
        }
        Ok(())
    }
}

impl Action {
    /// Its name for people, stats and command lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Action::Unspecified => "unspecified",
            Action::Route => "route",
            Action::Fault => "fault",
            Action::Delay => "delay",
            Action::Timeout => "timeout",
            Action::Debug => "debug",
            Action::Sample => "sample",
            Action::Config => "config",
        }
    }

    /// All that there are.
    pub const ALL: [Action; 7] =
        [Action::Route, Action::Fault, Action::Delay, Action::Timeout, Action::Debug, Action::Sample, Action::Config];
}
