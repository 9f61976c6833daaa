//! The wire between facade and logging, with anything on it.

use common::api::{Batch, EntryLine, write_entry};
use common::entry::Entry;
use proptest::prelude::*;
use testing::fuzz::near;

const BATCHES: &[&[u8]] = &[
    b"[]",
    b"{\"uuid\":\"01a203b3-3bb1-7319-90b9-a08e864b5eeb\",\"msg\":\"hello\"}",
    b"[{\"uuid\":\"01a203b3-3bb1-7319-90b9-a08e864b5eeb\",\"msg\":\"a \\\"\\u00e9\\n\",\"request_id\":\"r\"},\
      {\"uuid\":\"01a203b3-3bd3-7041-bd9b-405a081b6b3b\",\"msg\":\"b\",\"traceparent\":\"00-1-2-01\"}]",
];

const LINES: &[&[u8]] = &[
    b"{\"uuid\":\"01a203b3-3bb1-7319-90b9-a08e864b5eeb\",\"msg\":\"hello\"}",
    b"{\"uuid\":\"01a203b3-3bb1-7319-90b9-a08e864b5eeb\",\"msg\":\"\\u0007 \\\"quoted\\\" \\\\ \xf0\x9f\xa6\x80\"}",
];

proptest! {
    #[test]
    fn batch_is_refused_or_holds_entries(body in near(BATCHES)) {
        if let Ok(posted) = Batch::decode(&body) {
            for entry in posted.entries {
                prop_assert!(!entry.msg.is_empty());
                prop_assert_eq!(entry.uuid.get_version_num(), 7);
            }
        }
    }

    /// The facade passes a checked line on as it is: who reads it must find the entry and nothing else.
    #[test]
    fn checked_line_is_the_json_of_its_entry(line in near(LINES)) {
        if let Some(checked) = EntryLine::parse(&line) {
            let entry: Entry = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(entry.uuid, checked.uuid());
            prop_assert!(!line.contains(&b'\n'));
            let mut written = Vec::new();
            write_entry(&mut written, entry.uuid, &entry.msg);
            let written = EntryLine::parse(written.trim_ascii_end()).unwrap();
            let again: String = serde_json::from_str(written.msg).unwrap();
            prop_assert_eq!(again, entry.msg);
        }
    }
}
