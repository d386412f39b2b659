#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert_proxy_daemon::http::fuzz::request(bytes));
