//! TLS on the services, and between them.

use std::fs;
use std::process::Command;
use std::time::Instant;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use testing::command_line::assert_refused;
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

    /// A certificate by `issuer`, good until `year`, and those of `shown` behind it.
    fn replace_by_chain(&self, issuer: &Authority, shown: &[&Authority], year: i32) {
        let key = KeyPair::generate().unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        params.not_after = date_time_ymd(year, 1, 1);
        let mut chain = params.signed_by(&key, issuer).unwrap().pem();
        chain.extend(shown.iter().map(|authority| authority.pem()));
        fs::write(self.path("key"), key.serialize_pem()).unwrap();
        fs::write(self.path("cert"), chain).unwrap();
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

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str, issuer: Option<&Authority>) -> Authority {
    issuer_of(
        name,
        issuer,
        IsCa::Ca(BasicConstraints::Unconstrained),
        4000,
    )
}

fn issuer_of(name: &str, issuer: Option<&Authority>, is_ca: IsCa, until: i32) -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = is_ca;
    params.not_after = date_time_ymd(until, 1, 1);
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    match issuer {
        Some(issuer) => Authority::signed_by(params, key, issuer),
        None => Authority::self_signed(params, key),
    }
    .unwrap()
}

/// A file whose certificates do not make a chain, or that no client would take today, changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn broken_chain_is_refused_and_the_old_one_kept() {
    const YEARS_TO_COME: i32 = 4000;
    let root = authority("root", None);
    let (between, other) = (
        authority("between", Some(&root)),
        authority("other", Some(&root)),
    );
    let unconstrained = IsCa::Ca(BasicConstraints::Unconstrained);
    let expired = issuer_of("expired", Some(&root), unconstrained, 2020);
    let no_authority = issuer_of(
        "no authority",
        Some(&root),
        IsCa::ExplicitNoCa,
        YEARS_TO_COME,
    );
    let files = CertificateFiles::make();
    fs::write(files.path("root"), root.pem()).unwrap();
    files.replace_by_chain(&between, &[&between], YEARS_TO_COME);
    let (cert, key) = (files.path("cert"), files.path("key"));
    let tls = ["--tls-cert", &cert, "--tls-key", &key];
    let nobody = "http://127.0.0.1:1";
    let start = || Process::start(facade(nobody, nobody, &tls), free_address());
    let process = start();
    let ask = |process: &Process| {
        let mut curl = Command::new("curl");
        curl.args([
            "--silent",
            "--noproxy",
            "*",
            "--cacert",
            &files.path("root"),
        ]);
        let url = format!("https://localhost:{}/livez", process.address.port());
        let output = curl.arg(url).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let refusals = |log: &[String]| {
        let is_refusal = |line: &&String| line.contains("stays in use");
        log.iter().filter(is_refusal).count()
    };
    assert_eq!(ask(&process), "alive\n");
    let broken: [(&Authority, &[&Authority], i32, &str); 7] = [
        (&between, &[&other], YEARS_TO_COME, "does not vouch"),
        (
            &between,
            &[&between, &other],
            YEARS_TO_COME,
            "does not vouch",
        ),
        (
            &between,
            &[&root, &between],
            YEARS_TO_COME,
            "does not vouch",
        ),
        (&between, &[&between, &root], 2020, "does not vouch"),
        (
            &expired,
            &[&expired],
            YEARS_TO_COME,
            "its certificate 2: CertExpired",
        ),
        (
            &expired,
            &[&expired, &root],
            YEARS_TO_COME,
            "its certificate 2: CertExpired",
        ),
        (
            &no_authority,
            &[&no_authority],
            YEARS_TO_COME,
            "its certificate 2: it is not an authority's",
        ),
    ];
    for (index, (issuer, shown, year, reason)) in broken.into_iter().enumerate() {
        files.replace_by_chain(issuer, shown, year);
        process.wait_for_log(|log| refusals(log) > index);
        assert_eq!(ask(&process), "alive\n");
        assert_refused(&crate::processes::binary("facade"), &tls, reason);
    }
    let cut = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
    let chain = fs::read_to_string(&cert).unwrap();
    fs::write(&cert, chain + cut).unwrap();
    process.wait_for_log(|log| refusals(log) > broken.len());
    assert_eq!(ask(&process), "alive\n");
    files.replace_by_chain(&between, &[&between, &root], YEARS_TO_COME);
    process.wait_for_line(|line| line.ends_with("again"));
    assert_eq!(ask(&process), "alive\n");
    assert_eq!(ask(&start()), "alive\n");
}

/// The facade speaks HTTPS with instances whose certificate its authority vouches for, and with no others. A
/// new authority counts without a restart, and a broken file changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn instances_with_certificates_serve_a_facade_that_trusts_them() {
    let (ours, theirs) = (CertificateFiles::make(), CertificateFiles::make());
    let tokens = TokenFile::with(POSTER);
    let map = engine_under_test().empty_map();
    let start_logging = |address| {
        let mut command = Command::new(crate::processes::binary("logging"));
        command.args(["--map", &map.location, "--token-file", &tokens.flag()]);
        command.args([
            "--tls-cert",
            &ours.path("cert"),
            "--tls-key",
            &ours.path("key"),
        ]);
        Process::start(command, address)
    };
    let mut logging: Vec<Process> = (0..2).map(|_| start_logging(free_address())).collect();
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
    while trusting.readiness().matches(" is ready\"").count() < 2 {
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
        if path == "/stats" {
            let stats: Value = serde_json::from_str(&text).unwrap();
            let messages = ["the messages service refuses connections"];
            assert_eq!(stats["problems"], json!(messages));
        }
    }
    logging[0].kill();
    assert_eq!(post(&trusting).await.status(), 200);
    let doubting = start(&theirs);
    let mut refused = problem(post(&doubting).await, 503).await;
    assert_eq!(refused["stored"], "no");
    let readiness = doubting.readiness();
    assert!(
        readiness.contains("has no certificate that --logging-ca vouches for"),
        "{readiness}"
    );

    let our_own = fs::read(ours.path("cert")).unwrap();
    let strangers = fs::read(theirs.path("cert")).unwrap();
    let replace = |authority: &[u8]| fs::write(theirs.path("cert"), authority).unwrap();
    replace(&our_own);
    doubting.wait_until_ready();
    replace(b"no certificate");
    doubting.wait_for_line(|line| line.contains("stays in use"));
    assert_eq!(post(&doubting).await.status(), 200);
    replace(&strangers);
    doubting.wait_for_log(|log| log.iter().filter(|line| line.ends_with("again")).count() == 2);
    // Changes count for new connections.
    let address = logging[1].address;
    logging[1].kill();
    logging[1] = start_logging(address);
    refused = problem(post(&doubting).await, 503).await;
    assert_eq!(refused["stored"], "no");
    assert_eq!(post(&trusting).await.status(), 200);
}
