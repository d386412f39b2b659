//! zstd.

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::compression::zstd::{
        compressor::v3::{Zstd as ProtoCompressor, zstd::Strategy as ProtoStrategy},
        decompressor::v3::Zstd,
    },
    google::protobuf::Any,
};
use zstd::{
    stream::raw::{CParameter, DParameter, Encoder, InBuffer, Operation as _, OutBuffer},
    zstd_safe::{DCtx, Strategy, get_error_name},
};

use super::{Compress, Decompress, Failed, Step, chunk};
use crate::config::FieldError;

/// The counters of a decompressor.
pub(super) const ERRORS: [&str; 4] =
    ["zstd_generic_error", "zstd_dictionary_error", "zstd_checksum_wrong_error", "zstd_memory_error"];

/// The widest window that is decompressed, as a power of two: what RFC 9659 allows in HTTP.
const MAX_WINDOW_LOG: u32 = 23;

/// What has its defaults from Envoy.
#[derive(Debug)]
pub(super) struct Compressors {
    level: i32,
    checksum: bool,
    strategy: Option<Strategy>,
    chunk: usize,
}

impl Compressors {
    pub(super) fn parse(config: &Any, path: &str) -> Result<Compressors, FieldError> {
        let config: ProtoCompressor = unpack(config, path)?;
        let strategy = match config.strategy() {
            ProtoStrategy::Default => None,
            ProtoStrategy::Fast => Some(Strategy::ZSTD_fast),
            ProtoStrategy::Dfast => Some(Strategy::ZSTD_dfast),
            ProtoStrategy::Greedy => Some(Strategy::ZSTD_greedy),
            ProtoStrategy::Lazy => Some(Strategy::ZSTD_lazy),
            ProtoStrategy::Lazy2 => Some(Strategy::ZSTD_lazy2),
            ProtoStrategy::Btlazy2 => Some(Strategy::ZSTD_btlazy2),
            ProtoStrategy::Btopt => Some(Strategy::ZSTD_btopt),
            ProtoStrategy::Btultra => Some(Strategy::ZSTD_btultra),
            ProtoStrategy::Btultra2 => Some(Strategy::ZSTD_btultra2),
        };
        // A dictionary is refused by the table of honoured fields.
        let ProtoCompressor { compression_level, enable_checksum, chunk_size, .. } = config;
        Ok(Compressors {
            level: compression_level
                .map_or(zstd::DEFAULT_COMPRESSION_LEVEL, |level| i32::try_from(level.value).unwrap_or(i32::MAX)),
            checksum: enable_checksum,
            strategy,
            chunk: chunk(chunk_size.map(|size| size.value)),
        })
    }
}

impl super::Compressors for Compressors {
    fn compressor(&self) -> Option<Box<dyn Compress>> {
        let mut encoder = Encoder::new(self.level).ok()?;
        encoder.set_parameter(CParameter::ChecksumFlag(self.checksum)).ok()?;
        if let Some(strategy) = self.strategy {
            encoder.set_parameter(CParameter::Strategy(strategy)).ok()?;
        }
        Some(Box::new(Compressor { encoder, chunk: vec![0; self.chunk] }))
    }
}

struct Compressor {
    encoder: Encoder<'static>,
    chunk: Vec<u8>,
}

impl Compress for Compressor {
    fn compress(&mut self, input: &[u8], last: bool, out: &mut Vec<u8>) -> Result<(), Failed> {
        let mut input = InBuffer::around(input);
        loop {
            let taken = input.pos() == input.src.len();
            let mut chunk = OutBuffer::around(&mut self.chunk[..]);
            let left = if !taken {
                self.encoder.run(&mut input, &mut chunk).map(|_| 1)
            } else if last {
                self.encoder.finish(&mut chunk, true)
            } else {
                self.encoder.flush(&mut chunk)
            };
            let left = left.map_err(|_| Failed)?;
            out.extend_from_slice(chunk.as_slice());
            if left == 0 {
                return Ok(());
            }
        }
    }
}

/// What has its defaults from Envoy.
#[derive(Debug)]
pub(super) struct Decompressors {
    chunk: usize,
}

impl Decompressors {
    pub(super) fn parse(config: &Any, path: &str) -> Result<Decompressors, FieldError> {
        // Dictionaries are refused by the table of honoured fields.
        let Zstd { dictionaries: _, chunk_size } = unpack(config, path)?;
        Ok(Decompressors { chunk: chunk(chunk_size.map(|size| size.value)) })
    }
}

impl super::Decompressors for Decompressors {
    fn max_ratio(&self) -> u64 {
        super::MAX_RATIO
    }

    fn decompressor(&self) -> Option<Box<dyn Decompress>> {
        let mut context = DCtx::try_create()?;
        context.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG)).ok()?;
        Some(Box::new(Decompressor { context, chunk: vec![0; self.chunk] }))
    }
}

struct Decompressor {
    context: DCtx<'static>,
    chunk: Vec<u8>,
}

impl Decompress for Decompressor {
    fn step(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Step {
        let mut given = InBuffer::around(input);
        let mut chunk = OutBuffer::around(&mut self.chunk[..]);
        let result = self.context.decompress_stream(&mut chunk, &mut given);
        out.extend_from_slice(chunk.as_slice());
        let (taken, full) = (given.pos(), chunk.pos() == chunk.capacity());
        *input = &input[taken..];
        match result {
            Ok(_) if full || !input.is_empty() => Step::More,
            Ok(_) => Step::Drained,
            Err(code) => Step::Broken(match get_error_name(code) {
                name if name.contains("checksum") => ERRORS[2],
                name if name.contains("ictionary") => ERRORS[1],
                name if name.contains("not enough memory") => ERRORS[3],
                _ => ERRORS[0],
            }),
        }
    }
}
