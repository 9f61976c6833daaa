//! TLS on the services, and between them.

use std::fs;
use std::process::Command;
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};

use super::{POSTER, TokenFile};
use crate::processes::{Processes, facade};
use crate::system::{engine_under_test, problem};

/// The files of a certificate and its key; a new pair replaces them.
struct CertificateFiles {
    folder: TempDir,
}

impl CertificateFiles {
    fn make() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let files = Self { folder };
        files.replace();
        files
    }

    fn replace(&self) {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let made = rcgen::generate_simple_self_signed(names).unwrap();
        fs::write(self.path("key"), made.signing_key.serialize_pem()).unwrap();
        fs::write(self.path("cert"), made.cert.pem()).unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }
}

/// A service with a certificate speaks HTTPS only. It shows a new certificate without a restart, and keeps
/// the old one while the files do not fit.
#[tokio::test(flavor = "multi_thread")]
async fn certificate_follows_its_files() {
    let files = CertificateFiles::make();
    let (cert, key) = (files.path("cert"), files.path("key"));
    let tls = ["--tls-cert", &cert, "--tls-key", &key];
    let system = Processes::start_with(&tls);
    let port = system.facade.address.port();
    let curl = |arguments: &[&str]| {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail", "--noproxy", "*", "--cacert", &cert]);
        let output = curl.args(arguments).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let https = format!("https://localhost:{port}");
    assert!(curl(&["-d", "msg=hello", &https]).contains("\"msg\":\"hello\""));
    assert!(curl(&[&https]).contains("\"msg\":\"hello\""));
    assert_eq!(curl(&[&format!("http://localhost:{port}/livez")]), "");
    let listen = system.facade.address.to_string();
    let healthcheck = |flags: &[&str]| {
        let mut command = Command::new(crate::processes::binary("facade"));
        command
            .args(["healthcheck", "--listen", &listen])
            .args(flags);
        command.output().unwrap().status.success()
    };
    assert!(healthcheck(&tls));
    assert!(!healthcheck(&[]));

    let old = fs::read(&cert).unwrap();
    fs::write(&cert, "no certificate").unwrap();
    system
        .facade
        .wait_for_line(|line| line.contains("stays in use"));
    fs::write(files.path("old"), old).unwrap();
    let with_old = ["--cacert", &files.path("old"), &format!("{https}/livez")];
    assert_eq!(curl(&with_old), "alive\n");
    files.replace();
    let begin = Instant::now();
    while curl(&[&format!("{https}/livez")]) != "alive\n" {
        assert!(
            begin.elapsed() < PATIENCE,
            "the new certificate is not shown"
        );
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    assert_eq!(curl(&with_old), "");
}

/// The facade speaks HTTPS with instances whose certificate its authority vouches for, and with no others.
#[tokio::test(flavor = "multi_thread")]
async fn instances_with_certificates_serve_a_facade_that_trusts_them() {
    let (ours, theirs) = (CertificateFiles::make(), CertificateFiles::make());
    let tokens = TokenFile::with(POSTER);
    let map = engine_under_test().empty_map();
    let start = |_| {
        let mut command = Command::new(crate::processes::binary("logging"));
        command.args(["--map", &map.location, "--token-file", &tokens.flag()]);
        command.args([
            "--tls-cert",
            &ours.path("cert"),
            "--tls-key",
            &ours.path("key"),
        ]);
        Process::start(command, free_address())
    };
    let mut logging: Vec<Process> = (0..2).map(start).collect();
    // One by its address, one by its name: the certificate is for both.
    let urls = format!(
        "https://{},https://localhost:{}",
        logging[0].address,
        logging[1].address.port()
    );
    let start = |authority: &CertificateFiles| {
        let ca = authority.path("cert");
        let token = tokens.flag();
        let flags = [
            "--logging-ca",
            &ca,
            "--logging-token-file",
            &token,
            "--deadline",
            "1s",
        ];
        Process::start(facade(&urls, "http://127.0.0.1:1", &flags), free_address())
    };
    let http = reqwest::Client::new();
    let post = async |facade: &Process| {
        let request = http.post(facade.url()).body("hello");
        request.send().await.unwrap()
    };
    let trusting = start(&ours);
    let begin = Instant::now();
    while trusting.readiness().matches("\"ok\":true").count() < 2 {
        assert!(begin.elapsed() < PATIENCE, "{}", trusting.readiness());
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    let stored: Value = post(&trusting).await.json().await.unwrap();
    let uuid = stored["uuid"].as_str().unwrap();
    for path in ["/", &format!("/{uuid}"), "/stats"] {
        let response = http.get(format!("{}{path}", trusting.url())).send().await;
        let text = response.unwrap().text().await.unwrap();
        assert!(
            path == "/stats" || text.contains("\"msg\":\"hello\""),
            "{text}"
        );
        assert!(!text.contains("\"problems\":[\""), "{text}");
    }
    logging[0].kill();
    assert_eq!(post(&trusting).await.status(), 200);
    let doubting = start(&theirs);
    let refused = problem(post(&doubting).await, 503).await;
    assert_eq!(refused["stored"], "no");
    let readiness = doubting.readiness();
    assert!(
        readiness.contains("has no certificate that --logging-ca vouches for"),
        "{readiness}"
    );
}
