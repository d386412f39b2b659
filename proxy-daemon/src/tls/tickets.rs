//! Session tickets and cached sessions, whose keys and time the configuration chooses.

use std::{
    fmt::{self, Write as _},
    sync::Arc,
    time::{Duration, SystemTime},
};

use aws_lc_rs::{
    cipher::{
        AES_256, AES_256_KEY_LEN, AES_CBC_IV_LEN, DecryptionContext, PaddedBlockDecryptingKey,
        PaddedBlockEncryptingKey, UnboundCipherKey,
    },
    hmac,
    iv::FixedLength,
};
use rustls::server::{ProducesTickets, StoresServerSessions};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{secrets::Needed, sha256};
use crate::config::model::SessionTicketKeys;

const NAME: usize = 16;
const TAG: usize = 32;
/// The bytes of a key, as in Envoy: a name, what authenticates and what encrypts.
const KEY: usize = NAME + TAG + AES_256_KEY_LEN;
/// How long a ticket may be used where nothing else is said: the library's time.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(12 * 60 * 60);
/// The longest time that a server may tell of (RFC 8446, 4.6.1), in seconds.
const LONGEST_HINT: u32 = 7 * 24 * 60 * 60;

/// One of `TlsSessionTicketKeys.keys`.
pub struct TicketKey {
    name: [u8; NAME],
    hmac: hmac::Key,
    encrypt: PaddedBlockEncryptingKey,
    decrypt: PaddedBlockDecryptingKey,
}

impl fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TicketKey").finish_non_exhaustive()
    }
}

impl TicketKey {
    /// A key of 80 bytes, which are taken apart as by Envoy: 16 are its name, 32 authenticate, 32 encrypt.
    ///
    /// # Errors
    /// Another length, in Envoy's words.
    pub fn new(bytes: &[u8]) -> Result<TicketKey, String> {
        let length =
            || format!("Incorrect TLS session ticket key length. Length {}, expected length {KEY}.", bytes.len());
        let bytes: &[u8; KEY] = bytes.try_into().map_err(|_| length())?;
        let (name, rest) = bytes.split_first_chunk::<NAME>().ok_or_else(length)?;
        let (hmac, aes) = rest.split_at(TAG);
        let unusable = |_| "the library does not take the key".to_owned();
        let cipher = || UnboundCipherKey::new(&AES_256, aes).map_err(unusable);
        Ok(TicketKey {
            name: *name,
            hmac: hmac::Key::new(hmac::HMAC_SHA256, hmac),
            encrypt: PaddedBlockEncryptingKey::cbc_pkcs7(cipher()?).map_err(unusable)?,
            decrypt: PaddedBlockDecryptingKey::cbc_pkcs7(cipher()?).map_err(unusable)?,
        })
    }

    /// RFC 5077, 4: name, IV, what is encrypted, and a tag over these and the context that the ticket is for.
    fn seal(&self, plain: &[u8], binding: &[u8; 32]) -> Option<Vec<u8>> {
        let mut encrypted = plain.to_vec();
        let context = self.encrypt.encrypt(&mut encrypted).ok()?;
        let iv: &[u8] = (&context).try_into().ok()?;
        let mut ticket = Vec::with_capacity(NAME + iv.len() + encrypted.len() + TAG);
        ticket.extend_from_slice(&self.name);
        ticket.extend_from_slice(iv);
        ticket.extend_from_slice(&encrypted);
        let tag = hmac::sign(&self.hmac, &authenticated(&ticket, binding));
        ticket.extend_from_slice(tag.as_ref());
        Some(ticket)
    }

    /// What [`TicketKey::seal`] has sealed with this key and this context.
    fn open(&self, ticket: &[u8], binding: &[u8; 32]) -> Option<Vec<u8>> {
        let (ticket, tag) = ticket.split_at_checked(ticket.len().checked_sub(TAG)?)?;
        hmac::verify(&self.hmac, &authenticated(ticket, binding), tag).ok()?;
        let (iv, encrypted) = ticket.get(NAME..)?.split_at_checked(AES_CBC_IV_LEN)?;
        let context = DecryptionContext::Iv128(FixedLength::try_from(iv).ok()?);
        let mut plain = encrypted.to_vec();
        let length = self.decrypt.decrypt(&mut plain, context).ok()?.len();
        plain.truncate(length);
        Some(plain)
    }
}

/// What the tag is over. The context comes first: it has a fixed length.
fn authenticated(ticket: &[u8], binding: &[u8; 32]) -> Vec<u8> {
    [binding, ticket].concat()
}

/// What a session is only good for: a client that one context has let in is no client of another one that has the same
/// keys. As in Envoy certificates count by their names and issuers, so that they can be renewed.
pub(super) fn binding(required: bool, needed: &Needed) -> [u8; 32] {
    let mut text = format!("{required}\n");
    for certificate in &needed.certificates {
        let leaf = certificate.key.cert.first().and_then(|der| X509Certificate::from_der(der).ok());
        let issuer = leaf.map(|(_, leaf)| super::peer::hex(leaf.issuer().as_raw()));
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:?} {issuer:?}", certificate.dns_names);
    }
    if let Some(peers) = &needed.validation {
        for certificate in peers.trusted_ca.iter().flat_map(|ca| &ca.certificates) {
            let _ = writeln!(text, "ca {}", super::peer::hex(&sha256(certificate)));
        }
        let _ = writeln!(
            text,
            "{:?} {:?} {:?} {}",
            peers.match_typed_subject_alt_names,
            peers.verify_certificate_hash,
            peers.verify_certificate_spki,
            peers.accept_untrusted
        );
    }
    sha256(text.as_bytes())
}

/// Tickets by keys that are configured: other processes that have the keys take them too.
#[derive(Debug)]
pub(super) struct KeyedTickets {
    keys: Arc<SessionTicketKeys>,
    binding: [u8; 32],
    age: Age,
}

impl KeyedTickets {
    pub(super) fn new(keys: Arc<SessionTicketKeys>, binding: [u8; 32], timeout: Option<Duration>) -> KeyedTickets {
        KeyedTickets { keys, binding, age: Age(timeout.unwrap_or(DEFAULT_LIFETIME)) }
    }
}

impl ProducesTickets for KeyedTickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.age.hint()
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.keys.keys.first()?.seal(&Age::stamped(plain), &self.binding)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let name = ticket.get(..NAME)?;
        let key = self.keys.keys.iter().find(|key| key.name == *name)?;
        self.age.fresh(key.open(ticket, &self.binding)?)
    }
}

/// Tickets of the library, which are good for a time that is configured.
#[derive(Debug)]
pub(super) struct AgingTickets {
    inner: Arc<dyn ProducesTickets>,
    age: Age,
}

impl AgingTickets {
    pub(super) fn new(inner: Arc<dyn ProducesTickets>, timeout: Duration) -> AgingTickets {
        AgingTickets { inner, age: Age(timeout) }
    }
}

impl ProducesTickets for AgingTickets {
    fn enabled(&self) -> bool {
        self.inner.enabled()
    }

    fn lifetime(&self) -> u32 {
        self.age.hint().min(self.inner.lifetime())
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.inner.encrypt(&Age::stamped(plain))
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.age.fresh(self.inner.decrypt(ticket)?)
    }
}

/// Sessions in a cache, which are good for a time that is configured.
#[derive(Debug)]
pub(super) struct AgingSessions {
    inner: Arc<dyn StoresServerSessions>,
    age: Age,
}

impl AgingSessions {
    pub(super) fn new(inner: Arc<dyn StoresServerSessions>, timeout: Duration) -> AgingSessions {
        AgingSessions { inner, age: Age(timeout) }
    }
}

impl StoresServerSessions for AgingSessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.inner.put(key, Age::stamped(&value))
    }

    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.age.fresh(self.inner.get(key)?)
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.age.fresh(self.inner.take(key)?)
    }

    fn can_cache(&self) -> bool {
        self.inner.can_cache()
    }
}

/// How old a session may be.
#[derive(Debug, Clone, Copy)]
struct Age(Duration);

impl Age {
    fn hint(self) -> u32 {
        u32::try_from(self.0.as_secs()).map_or(LONGEST_HINT, |seconds| seconds.min(LONGEST_HINT))
    }

    /// The session with the time of day.
    fn stamped(session: &[u8]) -> Vec<u8> {
        [&now().to_be_bytes(), session].concat()
    }

    /// The session, where it is not too old.
    fn fresh(self, mut stamped: Vec<u8>) -> Option<Vec<u8>> {
        let made = u64::from_be_bytes(*stamped.first_chunk()?);
        let is_fresh = now().saturating_sub(made) <= self.0.as_secs();
        stamped.drain(..size_of::<u64>());
        is_fresh.then_some(stamped)
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
#[path = "tickets_tests.rs"]
mod tests;
