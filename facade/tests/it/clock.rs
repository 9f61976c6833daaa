//! A facade whose clock is wrong and then corrected.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use facade::identifiers::Identifiers;

use crate::system::{System, problem};

/// Seconds by which the clock is set back; it is a minute ahead.
const RIGHT: u64 = 60;

/// While the clock is a minute ahead, a POST fails with a detail that names the clock, and nothing is
/// stored. Once the clock is right, the facade stores again at once and reports that UUIDs went back.
#[tokio::test]
async fn facade_stores_again_as_soon_as_its_clock_is_right() {
    let behind = Arc::new(AtomicU64::new(RIGHT));
    let seconds = behind.clone();
    let clock = move || {
        let behind = Duration::from_secs(seconds.load(Ordering::Relaxed));
        SystemTime::now() + Duration::from_secs(RIGHT) - behind
    };
    let system = System::start_with_identifiers(Identifiers::new(clock)).await;
    let before = system.store("before").await;
    behind.store(0, Ordering::Relaxed);
    let refused = system.post().body("ahead").send().await.unwrap();
    let refused = problem(refused, 503).await;
    assert_eq!(refused["stored"], "no");
    assert!(refused["detail"].as_str().unwrap().contains("clock"));

    behind.store(RIGHT, Ordering::Relaxed);
    let after = system.store("after").await;
    assert!(after > before);
    for path in ["/readyz", "/readyz?verbose"] {
        let ready = system.get(path).await;
        assert_eq!(ready.status(), 200);
        let text = ready.text().await.unwrap();
        assert!(text.contains("clock was set back"), "{text}");
    }

    behind.store(RIGHT + 1, Ordering::Relaxed);
    assert!(system.store("a second earlier").await > after);
    assert_eq!(
        system.messages().await,
        ["before", "after", "a second earlier"]
    );
}
