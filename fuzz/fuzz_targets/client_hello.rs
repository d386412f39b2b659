#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| culvert_proxy_daemon::listener::fuzz_client_hello(bytes));
