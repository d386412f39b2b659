//! brotli.

use std::io::Write as _;

use brotli::{
    BrotliDecompressStream, BrotliResult, BrotliState, CompressorWriter,
    enc::{BrotliEncoderParams, StandardAlloc, backward_references::BrotliEncoderMode},
};
use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::compression::brotli::{
        compressor::v3::{Brotli as ProtoCompressor, brotli::EncoderMode},
        decompressor::v3::Brotli,
    },
    google::protobuf::Any,
};

use super::{Compress, Decompress, Failed, Step, chunk};
use crate::config::FieldError;

/// The counters of a decompressor.
pub(super) const ERRORS: [&str; 2] = ["brotli_error", "brotli_redundant_input"];

/// What has its defaults from Envoy.
pub(super) struct Compressors {
    params: BrotliEncoderParams,
    chunk: usize,
}

impl std::fmt::Debug for Compressors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Brotli").field("quality", &self.params.quality).finish_non_exhaustive()
    }
}

impl Compressors {
    pub(super) fn parse(config: &Any, path: &str) -> Result<Compressors, FieldError> {
        let config: ProtoCompressor = unpack(config, path)?;
        let mode = match config.encoder_mode() {
            EncoderMode::Text => BrotliEncoderMode::BROTLI_MODE_TEXT,
            EncoderMode::Font => BrotliEncoderMode::BROTLI_MODE_FONT,
            EncoderMode::Default | EncoderMode::Generic => BrotliEncoderMode::BROTLI_MODE_GENERIC,
        };
        let ProtoCompressor { quality, window_bits, input_block_bits, chunk_size, .. } = config;
        let params = BrotliEncoderParams {
            mode,
            quality: quality.map_or(3, |quality| quality.value.cast_signed()),
            lgwin: window_bits.map_or(18, |bits| bits.value.cast_signed()),
            lgblock: input_block_bits.map_or(24, |bits| bits.value.cast_signed()),
            disable_literal_context_modeling: i32::from(config.disable_literal_context_modeling),
            ..BrotliEncoderParams::default()
        };
        Ok(Compressors { params, chunk: chunk(chunk_size.map(|size| size.value)) })
    }
}

impl super::Compressors for Compressors {
    fn compressor(&self) -> Option<Box<dyn Compress>> {
        let writer = CompressorWriter::with_params(Vec::new(), self.chunk, &self.params);
        Some(Box::new(Compressor(Some(writer))))
    }
}

/// `None` after the end.
struct Compressor(Option<CompressorWriter<Vec<u8>>>);

impl Compress for Compressor {
    fn compress(&mut self, input: &[u8], last: bool, out: &mut Vec<u8>) -> Result<(), Failed> {
        let writer = self.0.as_mut().ok_or(Failed)?;
        writer.write_all(input).map_err(|_| Failed)?;
        if last {
            out.append(&mut self.0.take().ok_or(Failed)?.into_inner());
        } else {
            writer.flush().map_err(|_| Failed)?;
            out.append(writer.get_mut());
        }
        Ok(())
    }
}

/// What has its defaults from Envoy.
#[derive(Debug)]
pub(super) struct Decompressors {
    chunk: usize,
}

impl Decompressors {
    pub(super) fn parse(config: &Any, path: &str) -> Result<Decompressors, FieldError> {
        // How its ring buffer grows is refused by the table of honoured fields.
        let Brotli { disable_ring_buffer_reallocation: _, chunk_size } = unpack(config, path)?;
        Ok(Decompressors { chunk: chunk(chunk_size.map(|size| size.value)) })
    }
}

impl super::Decompressors for Decompressors {
    fn max_ratio(&self) -> u64 {
        super::MAX_RATIO
    }

    fn decompressor(&self) -> Option<Box<dyn Decompress>> {
        let alloc = StandardAlloc::default;
        Some(Box::new(Decompressor { state: BrotliState::new(alloc(), alloc(), alloc()), chunk: self.chunk }))
    }
}

struct Decompressor {
    state: BrotliState<StandardAlloc, StandardAlloc, StandardAlloc>,
    chunk: usize,
}

impl Decompress for Decompressor {
    fn step(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Step {
        let before = out.len();
        out.resize(before + self.chunk, 0);
        let (mut given, mut taken) = (input.len(), 0);
        let (mut room, mut written, mut total) = (self.chunk, 0, 0);
        let result = BrotliDecompressStream(
            &mut given,
            &mut taken,
            input,
            &mut room,
            &mut written,
            &mut out[before..],
            &mut total,
            &mut self.state,
        );
        out.truncate(before + written);
        *input = &input[taken..];
        match result {
            BrotliResult::NeedsMoreOutput => Step::More,
            BrotliResult::NeedsMoreInput => Step::Drained,
            BrotliResult::ResultSuccess if input.is_empty() => Step::Drained,
            // Something comes after the end.
            BrotliResult::ResultSuccess | BrotliResult::ResultFailure => Step::Broken(ERRORS[0]),
        }
    }
}
