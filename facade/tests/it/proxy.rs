//! nginx in front of the facade, with the settings of docs/proxy.md and with its own defaults.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use futures_util::StreamExt;
use reqwest::{Body, Client, Response};
use testing::process::{LOOK_AGAIN, PATIENCE, free_address};
use testing::requirements::{skip, trial_run};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::processes::Processes;

/// Large enough to be on its way for a while, as the client reads only its beginning.
const MESSAGES: usize = 1000;

/// nginx; dropping it ends it.
struct Nginx {
    master: Child,
    url: String,
    _folder: tempfile::TempDir,
}

impl Nginx {
    /// `None` where there is no nginx: the test is skipped.
    fn start(server: &str, facade: &str) -> Option<Self> {
        if let Err(why) = trial_run(Command::new("nginx").arg("-v")) {
            skip(&format!("no nginx: {why}"), "REQUIRE_ALL");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let address = free_address();
        let server = server
            .replace("listen 80", &format!("listen {address}"))
            .replace("http://127.0.0.1:8086", facade);
        let path = folder.path().display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|of| format!("{of}_temp_path {path}/{of};\n"))
            .concat();
        let config = format!(
            "daemon off;\nmaster_process off;\npid {path}/pid;\nerror_log {path}/error.log;\n\
             events {{}}\nhttp {{\naccess_log off;\n{temporary}{server}\n}}\n"
        );
        let file = folder.path().join("nginx.conf");
        fs::write(&file, config).unwrap();
        let master = Command::new("nginx")
            .args(["-e", "stderr", "-c"])
            .arg(&file)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let begin = Instant::now();
        while std::net::TcpStream::connect(address).is_err() {
            assert!(begin.elapsed() < PATIENCE, "nginx does not listen");
            std::thread::sleep(LOOK_AGAIN);
        }
        Some(Self {
            master,
            url: format!("http://{address}"),
            _folder: folder,
        })
    }

    /// With the settings of the documentation.
    fn as_documented(facade: &str) -> Option<Self> {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/proxy.md");
        let page = fs::read_to_string::<PathBuf>(page).unwrap();
        let (_, rest) = page.split_once("```nginx\n").unwrap();
        let (server, _) = rest.split_once("```").unwrap();
        Self::start(server, facade)
    }

    /// With nothing but the facade's address, and no file that takes the whole body at once.
    fn by_default(facade: &str) -> Option<Self> {
        let server = "server { listen 80; location / { proxy_pass http://127.0.0.1:8086; \
                      proxy_max_temp_file_size 0; } }";
        Self::start(server, facade)
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.master.kill();
        let _ = self.master.wait();
    }
}

async fn fill(system: &Processes) {
    let message = "x".repeat(60_000);
    let lines = format!("\"{message}\"\n").repeat(MESSAGES);
    let upload = system.http.post(system.facade.url()).body(lines);
    let upload = upload.header("content-type", "application/x-ndjson");
    assert_eq!(upload.send().await.unwrap().status(), 200);
}

async fn read(mut answer: Response) -> reqwest::Result<usize> {
    let mut bytes = 0;
    while let Some(piece) = answer.chunk().await? {
        bytes += piece.len();
    }
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_as_documented_passes_clients_uploads_and_new_messages_on() {
    let system = Processes::start_with(&["--trusted-proxy", "127.0.0.1"]);
    let Some(nginx) = Nginx::as_documented(&system.facade.url()) else {
        return;
    };
    let follow = system
        .http
        .get(format!("{}/?follow=true&tail=0", nginx.url));
    let follow = follow.header("accept", "text/plain").send();
    let mut followed = follow.await.unwrap().bytes_stream();
    let (pieces, received) = tokio::sync::mpsc::unbounded_channel();
    let received = futures_util::stream::unfold(received, async |mut received| {
        let piece: &str = received.recv().await?;
        Some((Ok::<_, std::io::Error>(piece), received))
    });
    // All of 127.0.0.0/8 is this machine, so the client has another address than nginx.
    let client = Client::builder().local_address(IpAddr::from([127, 0, 0, 2]));
    let upload = client
        .build()
        .unwrap()
        .post(&nginx.url)
        .body(Body::wrap_stream(received.boxed()));
    let upload = upload
        .header("content-type", "application/x-ndjson")
        .header("forwarded", "for=192.0.2.1");
    let upload = tokio::spawn(upload.send());
    pieces.send("\"through nginx\"\n").unwrap();
    let mut seen = String::new();
    while !seen.contains("through nginx") {
        let piece = followed.next().await.unwrap().unwrap();
        seen.push_str(std::str::from_utf8(&piece).unwrap());
    }
    drop(pieces);
    assert_eq!(upload.await.unwrap().unwrap().status(), 200);
    let is_clients =
        |line: &str| line.contains("method=\"POST\"") && line.contains("client=127.0.0.2");
    system.facade.wait_for_line(is_clients);
    let elsewhere = system
        .http
        .get(&nginx.url)
        .header("host", "elsewhere.example");
    assert_eq!(elsewhere.send().await.unwrap().status(), 421);
}

/// All instances are killed in the middle of a GET: the client sees that the body is cut, also through an
/// nginx that speaks HTTP/1.0 to the facade, and also if it speaks HTTP/1.0 itself.
#[tokio::test(flavor = "multi_thread")]
async fn cut_body_is_a_failure_through_nginx_too() {
    let start: [fn(&str) -> Option<Nginx>; 2] = [Nginx::as_documented, Nginx::by_default];
    for start in start {
        let mut system = Processes::start_with(&["--read-deadline", "2s"]);
        let Some(nginx) = start(&system.facade.url()) else {
            return;
        };
        fill(&system).await;
        let whole = read(system.http.get(&nginx.url).send().await.unwrap()).await;
        assert!(whole.unwrap() > MESSAGES * 60_000);
        let through = system.http.get(&nginx.url).send().await.unwrap();
        let mut direct = TcpStream::connect(system.facade.address).await.unwrap();
        direct.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        direct.read_u8().await.unwrap();
        let unread = system.http.get(system.facade.url()).send().await.unwrap();
        for instance in &mut system.logging {
            instance.kill();
        }
        assert!(read(unread).await.is_err());
        assert!(read(through).await.is_err());
        assert!(direct.read_to_end(&mut Vec::new()).await.is_err());
    }
}
