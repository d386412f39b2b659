//! jwt_authn: tokens of all kinds, good and bad ones.

use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair,
    Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384,
    RSA_PSS_SHA512,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;

use super::harness::{By, Case, case};

const JWT: &str = "jwt_authn.v3.JwtAuthentication";
const PER_ROUTE: &str = "jwt_authn.v3.PerRouteConfig";

struct Signers {
    rsa: RsaKeyPair,
    /// Of P-256, P-384 and P-521.
    ec: [EcdsaKeyPair; 3],
    ed: Ed25519KeyPair,
}

static SIGNERS: LazyLock<Signers> = LazyLock::new(|| Signers {
    rsa: RsaKeyPair::generate(KeySize::Rsa2048).expect("a key"),
    ec: [&ECDSA_P256_SHA256_FIXED_SIGNING, &ECDSA_P384_SHA384_FIXED_SIGNING, &ECDSA_P521_SHA512_FIXED_SIGNING]
        .map(|curve| EcdsaKeyPair::generate(curve).expect("a key")),
    ed: Ed25519KeyPair::generate().expect("a key"),
});

/// A part of the public key, whose DER begins with nine bytes and ends with the exponent, 65537.
fn number(key: &RsaKeyPair, exponent: bool) -> String {
    let der = key.public_key().as_ref();
    BASE64.encode(if exponent { &der[der.len() - 3..] } else { &der[9..9 + 256] })
}

/// The public keys of all signers.
pub fn keys() -> String {
    let curve = |(key, curve): (&EcdsaKeyPair, &str)| {
        let point = &key.public_key().as_ref()[1..];
        let (x, y) = point.split_at(point.len() / 2);
        let (x, y) = (BASE64.encode(x), BASE64.encode(y));
        format!(r#"{{"kty": "EC", "kid": "{curve}", "crv": "{curve}", "x": "{x}", "y": "{y}"}}"#)
    };
    let curves: Vec<_> = SIGNERS.ec.iter().zip(["P-256", "P-384", "P-521"]).map(curve).collect();
    format!(
        "{{\"keys\": [{{\"kty\": \"RSA\", \"kid\": \"r\", \"n\": \"{}\", \"e\": \"{}\"}}, {}, {{\"kty\": \
         \"OKP\", \"kid\": \"d\", \"alg\": \"EdDSA\", \"crv\": \"Ed25519\", \
         \"x\": \"{}\"}}, {{\"kty\": \"oct\", \"kid\": \"h\", \"alg\": \"HS256\", \"k\": \"c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0\"}}]}}",
        number(&SIGNERS.rsa, false),
        number(&SIGNERS.rsa, true),
        curves.join(", "),
        BASE64.encode(SIGNERS.ed.public_key()),
    )
}

fn signed(algorithm: &str, header: &str, payload: &str) -> String {
    let text = format!("{}.{}", BASE64.encode(header), BASE64.encode(payload));
    let (random, bytes) = (SystemRandom::new(), text.as_bytes());
    let rsa = |kind| {
        let mut signature = vec![0; SIGNERS.rsa.public_modulus_len()];
        SIGNERS.rsa.sign(kind, &random, bytes, &mut signature).expect("a signature");
        signature
    };
    let ec = |curve: usize| SIGNERS.ec[curve].sign(&random, bytes).expect("a signature").as_ref().to_vec();
    let signature = match algorithm {
        "RS256" => rsa(&RSA_PKCS1_SHA256),
        "RS384" => rsa(&RSA_PKCS1_SHA384),
        "RS512" => rsa(&RSA_PKCS1_SHA512),
        "PS256" => rsa(&RSA_PSS_SHA256),
        "PS384" => rsa(&RSA_PSS_SHA384),
        "PS512" => rsa(&RSA_PSS_SHA512),
        "ES256" => ec(0),
        "ES384" => ec(1),
        "ES512" => ec(2),
        "EdDSA" => SIGNERS.ed.sign(bytes).as_ref().to_vec(),
        "HS256" => hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, b"secretsecretsecretsecret"), bytes).as_ref().to_vec(),
        other => other.as_bytes().to_vec(),
    };
    format!("{text}.{}", BASE64.encode(signature))
}

fn token(algorithm: &str, payload: &str) -> String {
    signed(algorithm, &format!("{{\"alg\": \"{algorithm}\"}}"), payload)
}

fn with(token: &str) -> String {
    format!("GET /a?b=c\nauthorization: Bearer {token}")
}

fn good() -> String {
    token("HS256", "{\"iss\": \"i\", \"sub\": \"s\", \"aud\": [\"a\", \"b\"]}")
}

/// A provider with these keys, in flow style.
fn provider(more: &str) -> String {
    format!("{{issuer: i, local_jwks: {{inline_string: '{}'}}{more}}}", keys())
}

fn jwt(name: &'static str, config: &str, requests: &[String]) -> Case {
    let requests: Vec<_> = requests.iter().map(String::as_str).collect();
    case(name, JWT, config, &requests)
}

/// Requests that need a token of the one provider.
fn one(name: &'static str, more: &str, requests: &[String]) -> Case {
    jwt(
        name,
        &format!(
            "providers: {{p: {}}}, rules: [{{match: {{prefix: /}}, requires: {{provider_name: p}}}}]",
            provider(more)
        ),
        requests,
    )
}

pub fn cases() -> Vec<Case> {
    [verified(), limited(), places(), told(), failures(), requirements(), states(), remote()].concat()
}

fn verified() -> Vec<Case> {
    let payload = "{\"iss\": \"i\"}";
    let mut requests: Vec<_> =
        ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "HS256"]
            .map(|kind| with(&token(kind, payload)))
            .into();
    requests.extend(["HS384", "none", "ES256K"].map(|kind| with(&token(kind, payload))));
    // Signed by another kind of key than the token says, or by one that it does not name.
    requests.extend(
        [("ES256", "ES384"), ("ES384", "ES512"), ("PS256", "RS256"), ("RS256", "PS256"), ("EdDSA", "ES256")]
            .map(|(signer, told)| with(&signed(signer, &format!(r#"{{"alg": "{told}"}}"#), payload))),
    );
    requests.extend(
        [("ES384", "P-384"), ("ES384", "P-521"), ("ES512", "P-521")]
            .map(|(kind, id)| with(&signed(kind, &format!(r#"{{"alg": "{kind}", "kid": "{id}"}}"#), payload))),
    );
    requests.extend(
        ["r", "x"].map(|id| with(&signed("RS256", &format!("{{\"alg\": \"RS256\", \"kid\": \"{id}\"}}"), payload))),
    );
    requests.extend([
        "GET /".to_owned(),
        "GET /direct".to_owned(),
        "HEAD /".to_owned(),
        "POST /\ncontent-type: application/grpc".to_owned(),
        with(&signed("HS256", "{\"alg\": 1}", payload)),
        with(&signed("HS256", "{\"alg\": \"HS256\", \"kid\": 1}", payload)),
        with("a.b"),
        with("a.b.c.d"),
        with("!"),
        with("e30.e30.e30"),
        with("YQ.e30.e30"),
        with("aaa.bbb.ccc"),
        with("a.bbb.ccc"),
        with("YQ==.e30.e30"),
        with(&format!("{}=", good())),
        with(&format!("{}==", good())),
        with(&format!("{}===", good())),
        with(&good().replace('.', "=.")),
        format!("GET /\nauthorization: Bearer {}x", good()),
        with(&signed("RS256", "{\"alg\": \"HS256\"}", payload)),
    ]);
    for payload in [
        "{\"iss\": \"other\"}",
        "{}",
        "[]",
        "{\"iss\": 1}",
        "{\"iss\": \"i\", \"sub\": 1}",
        "{\"iss\": \"i\", \"exp\": 1}",
        "{\"iss\": \"i\", \"exp\": 4000000000, \"nbf\": 1}",
        "{\"iss\": \"i\", \"nbf\": 4000000000}",
        "{\"iss\": \"i\", \"exp\": \"x\"}",
        "{\"iss\": \"i\", \"exp\": -1}",
        "{\"iss\": \"i\", \"iat\": \"x\"}",
        "{\"iss\": \"i\", \"nbf\": []}",
        "{\"iss\": \"i\", \"aud\": 1}",
        "{\"iss\": \"i\", \"aud\": [1]}",
        "{\"iss\": \"i\", \"jti\": 1}",
        "{\"iss\": \"i\", \"exp\": 0}",
        "{\"iss\": \"i\", \"iat\": -1}",
        "{\"iss\": \"i\", \"nbf\": -1}",
    ] {
        requests.push(with(&token("HS256", payload)));
    }
    let audiences: Vec<_> = ["\"a\"", "[\"x\", \"https://a/\"]", "\"x\"", "[]"]
        .map(|audience| with(&token("HS256", &format!("{{\"iss\": \"i\", \"aud\": {audience}}}"))))
        .into();
    vec![
        one("tokens", "", &requests),
        one("audiences", ", audiences: [a, c]", &audiences),
        one("a provider of any issuer", "", &requests[..2]).of_manager("via: v"),
    ]
}

/// What tokens must be besides good.
fn limited() -> Vec<Case> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let of = |claims: &str| with(&token("HS256", &format!("{{\"iss\": \"i\"{claims}}}")));
    let times =
        ["", ", \"exp\": 4000000000", &format!(", \"exp\": {}", now + 600), &format!(", \"exp\": {}", now - 30)];
    let times = times.map(of);
    let subjects = ["", ", \"sub\": \"\"", ", \"sub\": \"spiffe://a/b\"", ", \"sub\": \"other\""].map(of);
    vec![
        one("require_expiration", ", require_expiration: true", &times),
        one("max_lifetime", ", max_lifetime: 3600s", &times),
        one("max_lifetime and require_expiration", ", max_lifetime: 5000000000s, require_expiration: true", &times),
        one("subjects", ", subjects: {prefix: \"spiffe://\"}", &subjects),
        one("any subject", ", subjects: {safe_regex: {regex: \".*\"}}", &subjects),
    ]
}

/// What is wrong with tokens, as others are told.
fn failures() -> Vec<Case> {
    let requests = [
        "GET /".to_owned(),
        with(&good()),
        with("bad"),
        with(&token("HS384", "{\"iss\": \"i\"}")),
        with(&token("HS256", "{\"iss\": \"other\"}")),
        with(&token("HS256", "{\"iss\": \"i\", \"exp\": 1}")),
        with(&token("HS256", "{\"iss\": \"i\", \"aud\": \"x\"}")),
        with(&signed("RS256", "{\"alg\": \"HS256\"}", "{\"iss\": \"i\", \"aud\": \"a\"}")),
        with(&signed("RS256", "{\"alg\": \"RS256\", \"kid\": \"x\"}", "{\"iss\": \"i\", \"aud\": \"a\"}")),
        format!("{}\nx-q: bad", with(&good())),
    ];
    let told = ", audiences: [a], failed_status_in_metadata: k";
    let of_two = |name, requires: &str| {
        let providers = format!(
            "providers: {{p: {}, q: {}}}",
            provider(told),
            provider(", failed_status_in_metadata: h").replace("issuer: i", "issuer: j, from_headers: [{name: x-q}]")
        );
        jwt(name, &format!("{providers}, rules: [{{match: {{prefix: /}}, requires: {{{requires}}}}}]"), &requests)
    };
    let of_one = |name, requires: &str| {
        let providers = format!("providers: {{p: {}}}", provider(told));
        jwt(name, &format!("{providers}, rules: [{{match: {{prefix: /}}, requires: {{{requires}}}}}]"), &requests)
    };
    vec![
        one("failed_status_in_metadata", told, &requests),
        of_one("failures that are allowed", "allow_missing_or_failed: {}"),
        of_one("tokens that may be missing", "allow_missing: {}"),
        of_two("failures of one of two", "requires_any: {requirements: [{provider_name: p}, {provider_name: q}]}"),
        of_two("failures that are allowed, of two", "allow_missing_or_failed: {}"),
        jwt(
            "strip_failure_response",
            &format!(
                "strip_failure_response: true, providers: {{p: {}}}, rules: [{{match: {{prefix: /}}, requires: {{provider_name: p}}}}]",
                provider(told)
            ),
            &requests,
        ),
        jwt(
            "strip_failure_response, and a wrong name by route",
            &format!("strip_failure_response: true, providers: {{p: {}}}", provider("")),
            &requests[..1],
        )
        .told(By::Route, PER_ROUTE, "requirement_name: other"),
    ]
}

fn places() -> Vec<Case> {
    let good = good();
    let requests = [
        format!("GET /?access_token={good}&x=1"),
        format!("GET /?x=1&t={good}&y=2"),
        format!("GET /\nx-token: {good}"),
        format!("GET /\nx-token: pre{good}"),
        "GET /\nx-token: pre bad".to_owned(),
        format!("GET /\ncookie: a=b; c={good}"),
        format!("GET /\nauthorization: Bearer {good}\nx-token: pre{good}"),
        format!("GET /\nauthorization: bearer {good}"),
        format!("GET /\nauthorization: Basic {good}"),
        format!("GET /\nauthorization: Bearer {good}, more"),
        format!("GET /?access_token={good}\nauthorization: Bearer bad"),
    ];
    vec![
        one("places", "", &requests),
        one("places, forwarded", ", forward: true", &requests),
        one("a header", ", from_headers: [{name: x-token, value_prefix: pre}]", &requests),
        one("a header without prefix", ", from_headers: [{name: x-token}]", &requests),
        one("a parameter", ", from_params: [t]", &requests),
        one("a cookie", ", from_cookies: [c]", &requests),
        one("several places", ", from_cookies: [c], from_params: [t], from_headers: [{name: x-token}]", &requests),
    ]
}

fn told() -> Vec<Case> {
    let full = with(&token(
        "HS256",
        "{\"iss\": \"i\", \"t\": \"text\", \"n\": 5, \"f\": 1.5, \"b\": true, \"l\": [1], \"s\": {\"k\": \"deep\"}}",
    ));
    let claim = |name: &str| format!("{{header_name: x-{}, claim_name: \"{name}\"}}", name.replace('.', "-"));
    let claims: Vec<_> = ["t", "n", "b", "l", "s.k", "none"].map(claim).into();
    let claims = format!(", claim_to_headers: [{}]", claims.join(", "));
    vec![
        one(
            "the payload",
            ", forward_payload_header: x-payload",
            &[full.clone(), format!("{full}\nx-payload: forged"), "GET /\nx-payload: forged".to_owned()],
        ),
        one(
            "the payload, padded",
            ", forward_payload_header: x-payload, pad_forward_payload_header: true",
            &[full.clone(), with(&good())],
        ),
        one("claims", &claims, &[full.clone(), format!("{full}\nx-t: forged\nx-none: forged")]),
        jwt(
            "claims where none are asked for",
            &format!(
                "providers: {{p: {}}}, bypass_cors_preflight: true, \
                 rules: [{{match: {{prefix: /plain}}}}, {{match: {{prefix: /in}}, requires: {{provider_name: p}}}}]",
                provider(", forward_payload_header: x-payload, claim_to_headers: [{header_name: x-t, claim_name: t}]")
            ),
            &[
                "GET /plain\nx-t: forged\nx-payload: forged",
                "GET /out\nx-t: forged\nx-payload: forged",
                "OPTIONS /in\norigin: a\naccess-control-request-method: GET\nx-t: forged",
            ]
            .map(str::to_owned),
        ),
        one("access by claims", ", payload_in_metadata: k", &[with(&good()), full.clone(), "GET /".to_owned()]).then(
            "rbac.v3.RBAC",
            "rules: {action: ALLOW, policies: {p: {permissions: [{any: true}], principals: [{metadata: {filter: \
             envoy.filters.http.jwt_authn, path: [{key: k}, {key: t}], value: {present_match: true}}}]}}}",
        ),
        one(
            "a claim that is no header",
            ", claim_to_headers: [{header_name: x-sub, claim_name: sub}]",
            &["a\\nb", "\u{fc}", ""].map(|sub| {
                let token = token("HS256", &format!("{{\"iss\": \"i\", \"sub\": \"{sub}\"}}"));
                format!("{}\nx-sub: forged", with(&token))
            }),
        )
        .of_log("%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%"),
        one(
            "lists in the payload",
            ", payload_in_metadata: k, normalize_payload_in_metadata: {space_delimited_claims: [scope, none]}",
            &["\"a b  c\"", "\"\"", "\" \"", "\"a\"", "[\"x y\"]", "1"]
                .map(|scope| with(&token("HS256", &format!("{{\"iss\": \"i\", \"scope\": {scope}}}")))),
        ),
        one("metadata of tokens", ", payload_in_metadata: k, header_in_metadata: h", &[with(&good())]),
        one(
            "routes by claims",
            ", clear_route_cache: true, claim_to_headers: [{header_name: x-t, claim_name: t}]",
            &[full],
        ),
        routes_by_metadata(),
    ]
}

/// What a token says is matched in all ways.
fn routes_by_metadata() -> Case {
    const VALUES: [(&str, &str); 16] = [
        ("t", "{string_match: {prefix: te}}"),
        ("t", "{string_match: {exact: te}}"),
        ("num", "{double_match: {exact: 1.5}}"),
        ("num", "{double_match: {range: {start: 1.5, end: 2}}}"),
        ("num", "{double_match: {range: {start: 1, end: 1.5}}}"),
        ("b", "{bool_match: true}"),
        ("z", "{null_match: {}}"),
        ("none", "{null_match: {}}"),
        ("none", "{present_match: true}"),
        ("none", "{present_match: false}"),
        ("t", "{present_match: false}"),
        ("s", "{present_match: true}"),
        ("l", "{list_match: {one_of: {string_match: {exact: two}}}}"),
        ("s}, {key: k", "{or_match: {value_matchers: [{null_match: {}}, {string_match: {suffix: p}}]}}"),
        ("t}, {key: k", "{present_match: true}"),
        ("none", "{string_match: {exact: x}}, invert: true"),
    ];
    let token = token(
        "HS256",
        "{\"iss\": \"i\", \"t\": \"text\", \"num\": 1.5, \"b\": true, \"z\": null, \"l\": [\"one\", \"two\"], \"s\": {\"k\": \"deep\"}}",
    );
    let request = |number: usize| format!("GET /m{number}/\nauthorization: Bearer {token}");
    let requests: Vec<_> = (0..VALUES.len()).map(request).chain(["GET /m0/".to_owned()]).collect();
    let case = one(
        "routes by metadata",
        ", clear_route_cache: true, payload_in_metadata: k, forward_payload_header: x-payload",
        &requests,
    );
    VALUES.iter().enumerate().fold(case, |case, (number, (key, value))| {
        case.first(&format!(
            "{{match: {{prefix: /m{number}/, dynamic_metadata: [{{filter: envoy.filters.http.jwt_authn, path: [{{key: k}}, {{key: {key}}}], \
             value: {value}}}]}}, direct_response: {{status: 203}}}}"
        ))
    })
}

fn requirements() -> Vec<Case> {
    let providers = format!(
        "providers: {{p: {}, q: {}}}",
        provider(", forward: true"),
        provider(", forward: true").replace("issuer: i", "issuer: j, from_headers: [{name: x-q}]")
    );
    let j = token("HS256", "{\"iss\": \"j\"}");
    let requests = [
        "GET /".to_owned(),
        with(&good()),
        format!("GET /\nx-q: {j}"),
        format!("{}\nx-q: {j}", with(&good())),
        with("bad"),
        with(&j),
        format!("{}\nx-q: bad", with(&good())),
        format!("GET /plain\nx-q: {j}"),
        "OPTIONS /\norigin: a\naccess-control-request-method: GET".to_owned(),
    ];
    let headers = "forward_payload_header: x-payload, claim_to_headers: [{header_name: x-sub, claim_name: sub}]";
    let same_headers = format!(
        "providers: {{p: {}, q: {}}}",
        provider(&format!(", {headers}")),
        provider(&format!(", {headers}")).replace("issuer: i", "issuer: j, from_headers: [{name: x-q}]")
    );
    let both = [
        format!("{}\nx-q: {}", with(&good()), token("HS256", "{\"iss\": \"j\", \"sub\": \"other\"}")),
        format!(
            "GET /?access_token={}\nauthorization: Bearer {}",
            good(),
            token("HS256", "{\"iss\": \"i\", \"sub\": \"o\"}")
        ),
    ];
    let of_both = |name, requires: &str| {
        jwt(name, &format!("{same_headers}, rules: [{{match: {{prefix: /}}, requires: {{{requires}}}}}]"), &both)
    };
    let rule = |name, requires: &str| {
        jwt(
            name,
            &format!(
                "{providers}, rules: [{{match: {{prefix: /plain}}}}, {{match: {{prefix: /}}, requires: {{{requires}}}}}]"
            ),
            &requests,
        )
    };
    vec![
        rule("any", "requires_any: {requirements: [{provider_name: p}, {provider_name: q}]}"),
        rule("all", "requires_all: {requirements: [{provider_name: p}, {provider_name: q}]}"),
        rule("any, or none", "requires_any: {requirements: [{provider_name: p}, {allow_missing: {}}]}"),
        rule("any, or bad", "requires_any: {requirements: [{provider_name: p}, {allow_missing_or_failed: {}}]}"),
        rule("missing allowed", "allow_missing: {}"),
        rule("failed allowed", "allow_missing_or_failed: {}"),
        rule("other audiences", "provider_and_audiences: {provider_name: p, audiences: [z]}"),
        of_both("the same headers, any", "requires_any: {requirements: [{provider_name: p}, {provider_name: q}]}"),
        of_both("the same headers, all", "requires_all: {requirements: [{provider_name: p}, {provider_name: q}]}"),
        of_both("the same headers, one", "provider_name: p"),
        of_both("the same headers, whatever", "allow_missing: {}"),
        jwt("no rules", &providers, &requests[..2]),
        jwt(
            "preflight",
            &format!(
                "{providers}, bypass_cors_preflight: true, rules: [{{match: {{prefix: /}}, requires: {{provider_name: p}}}}]"
            ),
            &requests,
        ),
        jwt(
            "by name",
            &format!(
                "{providers}, requirement_map: {{named: {{provider_name: p}}}}, rules: [{{match: {{path: /}}, requirement_name: named}}]"
            ),
            &requests,
        ),
        jwt("a name by route", &format!("{providers}, requirement_map: {{named: {{provider_name: p}}}}"), &requests)
            .told(By::Route, PER_ROUTE, "requirement_name: named"),
        jwt(
            "a wrong name by route",
            &format!("{providers}, requirement_map: {{named: {{provider_name: p}}}}"),
            &requests[..1],
        )
        .told(By::Route, PER_ROUTE, "requirement_name: other"),
        rule("off by route", "provider_name: p").told(By::Route, PER_ROUTE, "disabled: true"),
    ]
}

/// What the filter state asks for.
fn states() -> Vec<Case> {
    let providers =
        format!("providers: {{p: {}, q: {}}}", provider(""), provider("").replace("issuer: i", "issuer: j"));
    let rules = "filter_state_rules: {name: x.wanted, requires: {one: {provider_name: p}, two: {provider_name: q}}}";
    let state = "on_request_headers: [{object_key: x.wanted, factory_key: envoy.string, format_string: {text_format_source: {inline_string: '%REQ(x-wanted)%'}}}]";
    let mut requests: Vec<_> = ["one", "two", "three", ""].map(|wanted| format!("GET /\nx-wanted: {wanted}")).into();
    requests.extend(["one", "two", "three"].map(|wanted| format!("{}\nx-wanted: {wanted}", with(&good()))));
    requests.push("GET /plain\nx-wanted: one".to_owned());
    requests.push(format!("{}\nx-wanted: two", with(&token("HS256", "{\"iss\": \"j\"}"))));
    let of = |name, more: &str| {
        jwt(name, &format!("{providers}, {rules}{more}"), &requests).before("set_filter_state.v3.Config", state)
    };
    vec![
        of("requirements of the filter state", ""),
        of("rules before the filter state", ", rules: [{match: {prefix: /plain}}]"),
        jwt("nobody tells the filter state", &format!("{providers}, {rules}"), &requests[..2]),
    ]
}

fn remote() -> Vec<Case> {
    let remote_with = |name, path: &str, cluster: &str, more: &str| {
        let config = format!(
            "providers: {{p: {{issuer: i, remote_jwks: {{http_uri: {{uri: \"http://keys.test{path}\", cluster: {cluster}, timeout: 10s}}{more}}}}}}}, \
             rules: [{{match: {{prefix: /}}, requires: {{provider_name: p}}}}]"
        );
        jwt(name, &config, &[with(&good()), with(&token("RS256", "{\"iss\": \"i\"}")), "GET /".to_owned()])
    };
    let remote = |name, path: &str, cluster: &str| remote_with(name, path, cluster, "");
    // One that is kept, one that takes its place, one that is too long, and one that is bad.
    let (first, other) = (with(&token("HS256", "{\"iss\": \"i\"}")), with(&token("RS256", "{\"iss\": \"i\"}")));
    let long = with(&token("HS256", &format!("{{\"iss\": \"i\", \"x\": \"{}\"}}", "x".repeat(2000))));
    let bad = with(&format!("{}x", token("HS256", "{\"iss\": \"i\"}")));
    let repeated = [&first, &first, &other, &other, &first, &long, &long, &bad, &bad, &first].map(String::as_str);
    vec![
        remote_with("async_fetch", "/keys", "keys", ", async_fetch: {}"),
        remote_with(
            "async_fetch, fast_listener",
            "/keys",
            "keys",
            ", async_fetch: {fast_listener: true, failed_refetch_duration: 2s}",
        ),
        remote_with(
            "jwt_cache_config",
            "/keys",
            "keys",
            "}, jwt_cache_config: {jwt_cache_size: 1, jwt_max_token_size: 2000",
        )
        .with_requests(&repeated),
        remote_with("retry_policy", "/keys", "keys", ", retry_policy: {}"),
        remote_with(
            "retry_policy, and nobody there",
            "/keys",
            "dead",
            ", retry_policy: {num_retries: 2, retry_back_off: {base_interval: 0.01s, max_interval: 0.1s}}",
        ),
        remote_with("retry_policy, and not found", "/missing", "keys", ", retry_policy: {num_retries: 2}"),
        remote("fetched", "/keys", "keys"),
        remote("fetched, and no keys", "/none", "keys"),
        remote("fetched, and not found", "/missing", "keys"),
        remote("nobody there to fetch from", "/keys", "dead"),
        remote("no cluster to fetch from", "/keys", "none"),
    ]
}
