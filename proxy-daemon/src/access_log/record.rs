use std::{
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::ResponseFlags;
use crate::{http::metadata::Metadata, tls::TlsInfo};

/// The headers of a message, or those that were kept of it.
#[derive(Debug, Clone, Copy)]
pub enum Headers<'a> {
    /// All.
    All(&'a HeaderMap),
    /// A few: looked through, which takes less than to find them by their hash.
    Kept(&'a [(HeaderName, HeaderValue)]),
}

impl<'a> Headers<'a> {
    /// The value of a header; of several the first.
    pub fn get(self, name: &HeaderName) -> Option<&'a HeaderValue> {
        match self {
            Headers::All(headers) => headers.get(name),
            Headers::Kept(headers) => headers.iter().find(|(known, _)| known == name).map(|(_, value)| value),
        }
    }

    /// All values of a header.
    pub fn all(self, name: &HeaderName) -> impl Iterator<Item = &'a HeaderValue> {
        let (of_map, of_list) = match self {
            Headers::All(headers) => (Some(headers.get_all(name).into_iter()), &[][..]),
            Headers::Kept(headers) => (None, headers),
        };
        let of_list = of_list.iter().filter(move |(known, _)| known == name).map(|(_, value)| value);
        of_map.into_iter().flatten().chain(of_list)
    }
}

/// When things happened to a request; `None`: they have not, or nobody knows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// Its first byte came.
    pub began: Option<Instant>,
    /// Its last byte came.
    pub request_end: Option<Instant>,
    /// The connection to the host was begun, was there, and had its TLS handshake.
    pub connect: [Option<Instant>; 3],
    /// Its first byte was sent to the host.
    pub upstream_sent_first: Option<Instant>,
    /// The first byte of the response came from the host.
    pub upstream_answered: Option<Instant>,
    /// The last byte of the response came from the host.
    pub upstream_end: Option<Instant>,
    /// The first byte of the response was sent to the client.
    pub sent_first: Option<Instant>,
    /// The last byte of the response was sent to the client.
    pub end: Option<Instant>,
}

impl Times {
    /// Its last byte was sent to the host.
    pub fn upstream_sent(&self) -> Option<Instant> {
        Some(self.request_end?.max(self.upstream_sent_first?))
    }

    /// How long it was between the two; `None` where that is not known, or nothing.
    pub fn between(from: Option<Instant>, to: Option<Instant>) -> Option<Duration> {
        to?.checked_duration_since(from?)
    }
}

/// How long the names and values of headers are together, with those of pseudo-headers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeaderBytes {
    /// Of the request.
    pub request: u64,
    /// Of the response.
    pub response: u64,
    /// Of the response's trailers.
    pub trailers: u64,
}

/// What a line tells of one request, or of one TCP connection: then the HTTP fields stay empty and are written as `-`.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// What is written for what is not there.
    pub missing: &'static str,
    /// What it is a line of: `%ACCESS_LOG_TYPE%`.
    pub log_type: &'static str,
    /// When it began.
    pub start: SystemTime,
    /// From the beginning to the end of the response.
    pub duration: Duration,
    /// `HTTP/1.1`, `HTTP/2`.
    pub protocol: Option<&'a str>,
    /// The request's method.
    pub method: Option<&'a str>,
    /// The request's path with its query, as the upstream saw it.
    pub path: Option<&'a str>,
    /// The request's host.
    pub authority: Option<&'a str>,
    /// `http` or `https`.
    pub scheme: Option<&'a str>,
    /// The request's headers.
    pub request_headers: Option<Headers<'a>>,
    /// The response's headers.
    pub response_headers: Option<Headers<'a>>,
    /// How long names and values of the request's headers, the response's and its trailers' are, where a log shows it.
    pub header_bytes: HeaderBytes,
    /// The response's status; 0 where there was none.
    pub response_code: u16,
    /// Why it was not an ordinary response.
    pub response_flags: ResponseFlags,
    /// Where the status came from; empty: not known.
    pub response_code_details: Option<&'a str>,
    /// Body bytes from the client.
    pub bytes_received: u64,
    /// Body bytes to the client.
    pub bytes_sent: u64,
    /// The chosen host's address.
    pub upstream_host: Option<&'a str>,
    /// The chosen host's name, or its address where it has none.
    pub upstream_host_name: Option<&'a str>,
    /// The chosen cluster's name.
    pub upstream_cluster: Option<&'a str>,
    /// The chosen route's name.
    pub route_name: Option<&'a str>,
    /// The client's address, after `x-forwarded-for` or the PROXY protocol was looked at.
    pub downstream_remote_address: Option<SocketAddr>,
    /// The address that the connection came from.
    pub downstream_direct_remote_address: Option<SocketAddr>,
    /// The address that the connection was made to.
    pub downstream_local_address: Option<SocketAddr>,
    /// Our side of the upstream connection.
    pub upstream_local_address: Option<SocketAddr>,
    /// The downstream connection's number.
    pub connection_id: u64,
    /// The server that a TLS client asked for.
    pub requested_server_name: Option<&'a str>,
    /// What the downstream connection's TLS handshake came to.
    pub tls: Option<&'a TlsInfo>,
    /// The body of an answer that was made here, before its format.
    pub local_reply_body: &'a [u8],
    /// What the upstream connection's TLS handshake came to.
    pub upstream_tls: Option<&'a TlsInfo>,
    /// Why there was no connection to the host.
    pub upstream_transport_failure_reason: Option<&'a str>,
    /// When what happened.
    pub times: Times,
    /// The response's trailers.
    pub response_trailers: Option<Headers<'a>>,
    /// How many messages of gRPC the request and the response had, where `grpc_stats` tells.
    pub grpc_messages: Option<(u64, u64)>,
    /// How many attempts were made at it.
    pub attempts: u32,
    /// The connection to the host: its protocol.
    pub upstream_protocol: Option<&'static str>,
    /// The connection to the host: its number.
    pub upstream_connection_id: Option<u64>,
    /// The virtual cluster that it is counted under.
    pub virtual_cluster: Option<&'a str>,
    /// What the route's configuration says.
    pub route_metadata: Option<&'a Metadata>,
    /// What filters have told.
    pub metadata: Option<&'a Metadata>,
    /// It was a health check.
    pub health_check: bool,
    /// Why there was no TLS handshake with the client.
    pub downstream_transport_failure_reason: Option<&'a str>,
    /// The connection's listener.
    pub listener_name: Option<&'a str>,
    /// The connection's filter chain.
    pub filter_chain_name: Option<&'a str>,
}

impl Default for Record<'_> {
    fn default() -> Self {
        Record {
            missing: "-",
            log_type: "NotSet",
            start: SystemTime::UNIX_EPOCH,
            duration: Duration::ZERO,
            protocol: None,
            method: None,
            path: None,
            authority: None,
            scheme: None,
            request_headers: None,
            response_headers: None,
            header_bytes: HeaderBytes::default(),
            response_code: 0,
            response_flags: ResponseFlags::default(),
            response_code_details: None,
            bytes_received: 0,
            bytes_sent: 0,
            upstream_host: None,
            upstream_host_name: None,
            times: Times::default(),
            response_trailers: None,
            grpc_messages: None,
            attempts: 0,
            upstream_protocol: None,
            upstream_connection_id: None,
            virtual_cluster: None,
            route_metadata: None,
            upstream_cluster: None,
            route_name: None,
            downstream_remote_address: None,
            downstream_direct_remote_address: None,
            downstream_local_address: None,
            upstream_local_address: None,
            connection_id: 0,
            requested_server_name: None,
            tls: None,
            local_reply_body: b"",
            upstream_tls: None,
            upstream_transport_failure_reason: None,
            metadata: None,
            health_check: false,
            downstream_transport_failure_reason: None,
            listener_name: None,
            filter_chain_name: None,
        }
    }
}
