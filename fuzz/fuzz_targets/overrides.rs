#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert_xds_client::overrides::fuzz(bytes));
