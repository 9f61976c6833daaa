//! Values that are made of files, such as tokens and certificates, and made again when the files change.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, thread};

use tokio::sync::watch;

/// How often files are read again: what is new in them counts after this time.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// A value of [`follow`]; borrow it for as short as possible.
pub type Followed<T> = watch::Receiver<Arc<T>>;

/// Makes a value of the contents of `files`, and makes it again when they change. When that fails, the last
/// value stays, and the log says why. The contents are compared and not their times, so that nothing that
/// replaces a file is missed.
///
/// A thread reads the files, because a file system can hang. It ends when the value is dropped.
///
/// # Errors
/// A line for the operator that names the file, when there is no first value.
pub fn follow<T: Send + Sync + 'static>(
    files: Vec<PathBuf>,
    make: impl Fn(&[String]) -> Result<T, String> + Send + 'static,
) -> Result<Followed<T>, String> {
    let mut contents = read(&files)?;
    let first = make(&contents).map_err(|error| format!("{}: {error}", names(&files)))?;
    let (value, followed) = watch::channel(Arc::new(first));
    let mut last_error = None;
    let look_again = move || {
        while !value.is_closed() {
            thread::sleep(READ_AGAIN);
            let made = match read(&files) {
                Ok(same) if same == contents => continue,
                Ok(new) => {
                    contents = new;
                    make(&contents).map_err(|error| format!("{}: {error}", names(&files)))
                }
                Err(error) => Err(error),
            };
            match made {
                Ok(new) => {
                    last_error = None;
                    value.send_replace(Arc::new(new));
                    tracing::info!("read {} again", names(&files));
                }
                Err(error) if last_error.as_ref() == Some(&error) => {}
                Err(error) => {
                    tracing::warn!("{error}; what it held before stays in use");
                    last_error = Some(error);
                }
            }
        }
    };
    let thread = thread::Builder::new().name("files".to_owned());
    thread
        .spawn(look_again)
        .map_err(|error| format!("no thread can be started: {error}"))?;
    Ok(followed)
}

fn read(files: &[PathBuf]) -> Result<Vec<String>, String> {
    let read = files.iter().map(|file| {
        fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))
    });
    read.collect()
}

fn names(files: &[PathBuf]) -> String {
    let names: Vec<String> = files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    names.join(" and ")
}
