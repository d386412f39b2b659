use super::{fuzz::library, *};

fn compressed(kind: &str, pieces: &[&[u8]]) -> Vec<u8> {
    let library = compressors(Some(&library("compressor", kind)), "x").unwrap();
    let mut compressor = library.codecs.compressor().unwrap();
    let mut out = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        let before = out.len();
        compressor.compress(piece, index + 1 == pieces.len(), &mut out).unwrap();
        assert!(out.len() > before, "{kind}: a piece is sent on when it comes");
    }
    out
}

#[test]
fn what_was_compressed_in_pieces_comes_out_again_a_chunk_at_a_time() {
    let long: Vec<u8> = (0..200_000_u32).flat_map(|number| number.to_be_bytes()).collect();
    for kind in ["gzip", "brotli", "zstd"] {
        let input = compressed(kind, &[b"begins", &long, b"ends", b""]);
        let library = decompressors(Some(&library("decompressor", kind)), "x").unwrap();
        let mut decompressor = library.codecs.decompressor().unwrap();
        let mut out = Vec::new();
        for mut piece in input.chunks(1000) {
            loop {
                let before = out.len();
                let step = decompressor.step(&mut piece, &mut out);
                assert!(out.len() - before <= DEFAULT_CHUNK, "{kind}");
                match step {
                    Step::More => {}
                    Step::Drained => break,
                    Step::Broken(error) => panic!("{kind}: {error}"),
                }
            }
        }
        assert!(out == [b"begins", &long[..], b"ends"].concat(), "{kind}");
    }
}

#[test]
fn what_is_of_another_encoding_is_broken() {
    for kind in ["gzip", "brotli", "zstd"] {
        let library = decompressors(Some(&library("decompressor", kind)), "x").unwrap();
        let mut decompressor = library.codecs.decompressor().unwrap();
        let step = decompressor.step(&mut &b"xxxxxxxxxxxxxxxxxxxxxxxx"[..], &mut Vec::new());
        assert_eq!(step, Step::Broken(error_names(library.kind)[0]), "{kind}");
    }
}

#[test]
fn libraries_that_there_are_not_are_refused() {
    let error = compressors(Some(&library("decompressor", "gzip")), "a").err().unwrap().to_string();
    assert!(error.starts_with("a.typed_config: library envoy.extensions.compression.gzip.decompressor.v3.Gzip is"));
    assert_eq!(compressors(None, "a").err().unwrap().to_string(), "a: value is required");
}
