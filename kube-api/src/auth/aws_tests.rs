use std::collections::BTreeMap;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

fn config() -> AwsIamConfig {
    AwsIamConfig { cluster: "prod-east".into(), region: "eu-west-1".into(), profile: None }
}

fn auth(config: AwsIamConfig, env: &[(&str, &str)]) -> AwsIam {
    let env: BTreeMap<String, String> = env.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    AwsIam { config, env: Box::new(move |name| env.get(name).cloned()), remembered: Remembered::default() }
}

fn at() -> Timestamp {
    "2024-05-06T07:08:09.9Z".parse().unwrap()
}

#[test]
fn a_token_is_a_presigned_url() {
    let credentials = AwsCredentials {
        access_key_id: "AKIDEXAMPLE".into(),
        secret_access_key: "secret".into(),
        session_token: Some("a+b/c=".into()),
        ends: None,
    };
    let made = token(&config(), &credentials, at());
    let url = URL_SAFE_NO_PAD.decode(made.strip_prefix("k8s-aws-v1.").unwrap()).unwrap();
    let url = String::from_utf8(url).unwrap();
    // The signature was computed apart from this code, with Python's hmac and hashlib.
    assert_eq!(
        url,
        "https://sts.eu-west-1.amazonaws.com/?Action=GetCallerIdentity&Version=2011-06-15\
         &X-Amz-Algorithm=AWS4-HMAC-SHA256\
         &X-Amz-Credential=AKIDEXAMPLE%2F20240506%2Feu-west-1%2Fsts%2Faws4_request\
         &X-Amz-Date=20240506T070809Z&X-Amz-Expires=60&X-Amz-Security-Token=a%2Bb%2Fc%3D\
         &X-Amz-SignedHeaders=host%3Bx-k8s-aws-id\
         &X-Amz-Signature=79a0f98d75615b41c2426ef3e459c2af1e6fc69bb1a8b6805199076f18a8e548"
    );
    let china = token(&AwsIamConfig { region: "cn-north-1".into(), ..config() }, &credentials, at());
    let url = URL_SAFE_NO_PAD.decode(china.strip_prefix("k8s-aws-v1.").unwrap()).unwrap();
    assert!(url.starts_with(b"https://sts.cn-north-1.amazonaws.com.cn/?"));
}

#[tokio::test]
async fn a_token_is_renewed_a_minute_before_its_fifteen_are_over() {
    let auth = auth(config(), &[("AWS_ACCESS_KEY_ID", "A"), ("AWS_SECRET_ACCESS_KEY", "S")]);
    let ask = async |after: u64| {
        let now = at() + Duration::from_secs(after);
        auth.remembered.get(now, auth.new_token(now)).await.unwrap()
    };
    let first = ask(0).await;
    assert_eq!(ask(13 * 60).await, first);
    assert_ne!(ask(14 * 60).await, first);
}

#[tokio::test]
async fn credentials_are_looked_for_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("credentials");
    let text = "# mine\n[default]\naws_access_key_id = D\naws_secret_access_key=DS\n[other]\naws_access_key_id=O\n\
                aws_secret_access_key = OS\naws_session_token = OT\n[half]\naws_access_key_id=H\n";
    std::fs::write(&file, text).unwrap();
    let file = ("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap());
    let key = async |auth: AwsIam| auth.credentials().await.map(|found| (found.access_key_id, found.session_token));
    let keys = [("AWS_ACCESS_KEY_ID", "E"), ("AWS_SECRET_ACCESS_KEY", "ES"), file];
    assert_eq!(key(auth(config(), &keys)).await, Ok(("E".into(), None)));
    assert_eq!(key(auth(config(), &[file])).await, Ok(("D".into(), None)));
    assert_eq!(key(auth(config(), &[file, ("AWS_PROFILE", "other")])).await, Ok(("O".into(), Some("OT".into()))));
    let named = |profile: &str| AwsIamConfig { profile: Some(profile.into()), ..config() };
    assert_eq!(key(auth(named("other"), &keys)).await, Ok(("O".into(), Some("OT".into()))));
    let error = key(auth(named("half"), &[file])).await.unwrap_err().to_string();
    assert!(error.contains("profile: `half`"), "{error}");
    let error = key(auth(config(), &[("AWS_EC2_METADATA_DISABLED", "true")])).await.unwrap_err().to_string();
    assert!(error.contains("AWS credentials: none"), "{error}");
}

/// Answers each request with the first body whose path it begins with. Gives the address and the requests' heads.
async fn server(bodies: &'static [(&'static str, &'static str)]) -> (String, tokio::sync::mpsc::Receiver<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (heads, seen) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let (mut connection, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(connection.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap();
            let body = bodies.iter().find(|(request, _)| head.starts_with(request));
            let response = match body {
                Some((_, body)) => {
                    format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())
                }
                None => "HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".to_owned(),
            };
            heads.send(head).await.unwrap();
            connection.write_all(response.as_bytes()).await.unwrap();
        }
    });
    (address, seen)
}

#[tokio::test]
async fn an_instance_tells_its_role_s_credentials() {
    let (address, mut heads) = server(&[
        ("PUT /latest/api/token ", "session"),
        ("GET /latest/meta-data/iam/security-credentials/ ", "node-role"),
        (
            "GET /latest/meta-data/iam/security-credentials/node-role ",
            r#"{"Code": "Success", "AccessKeyId": "I", "SecretAccessKey": "S", "Token": "T", "Expiration": "2024-05-06T08:00:00Z"}"#,
        ),
    ])
    .await;
    let auth = auth(config(), &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &address)]);
    let found = auth.credentials().await.unwrap();
    assert_eq!((&*found.access_key_id, found.session_token.as_deref()), ("I", Some("T")));
    assert_eq!(found.ends, Some("2024-05-06T08:00:00Z".parse().unwrap()));
    assert!(heads.recv().await.unwrap().contains("x-aws-ec2-metadata-token-ttl-seconds: 300"));
    assert!(heads.recv().await.unwrap().contains("x-aws-ec2-metadata-token: session"));
}

#[tokio::test]
async fn a_service_account_assumes_its_role() {
    let (address, mut heads) = server(&[(
        "POST /?Action=AssumeRoleWithWebIdentity",
        r#"{"AssumeRoleWithWebIdentityResponse": {"AssumeRoleWithWebIdentityResult": {"Credentials":
            {"AccessKeyId": "W", "SecretAccessKey": "S", "SessionToken": "T", "Expiration": 1714982400.0}}}}"#,
    )])
    .await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "jwt.of.pod\n").unwrap();
    let auth = auth(
        config(),
        &[
            ("AWS_WEB_IDENTITY_TOKEN_FILE", file.to_str().unwrap()),
            ("AWS_ROLE_ARN", "arn:aws:iam::1:role/r"),
            ("AWS_ENDPOINT_URL_STS", &address),
        ],
    );
    let found = auth.credentials().await.unwrap();
    assert_eq!((&*found.access_key_id, found.session_token.as_deref()), ("W", Some("T")));
    assert_eq!(found.ends, Some("2024-05-06T08:00:00Z".parse().unwrap()));
    let head = heads.recv().await.unwrap();
    assert!(
        head.contains("RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fr") && head.contains("WebIdentityToken=jwt%2Eof%2Epod ")
    );
}

#[tokio::test]
async fn a_container_is_given_credentials_for_its_token() {
    let (address, mut heads) =
        server(&[("GET /v1/credentials?x=y ", r#"{"AccessKeyId": "C", "SecretAccessKey": "S"}"#)]).await;
    let url = format!("{address}/v1/credentials?x=y");
    let env = [("AWS_CONTAINER_CREDENTIALS_FULL_URI", &*url), ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "mine")];
    assert_eq!(auth(config(), &env).credentials().await.unwrap().access_key_id, "C");
    assert!(heads.recv().await.unwrap().contains("authorization: mine"));
    let wrong = format!("{address}/other");
    let env = [("AWS_CONTAINER_CREDENTIALS_FULL_URI", &*wrong)];
    let error = auth(config(), &env).credentials().await.err().unwrap().to_string();
    assert!(error.contains("container credentials") && error.contains("404"), "{error}");
}
