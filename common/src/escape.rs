//! Escaping, which makes text safe to print on one line.

/// Whether a character must be escaped: control characters, the line ends of Unicode, and the marks that
/// change the direction of text.
pub fn needs_escape(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// Whether bytes of UTF-8 have such a character before the last two bytes.
///
/// It reads bytes, and without an early exit, so that the compiler vectorizes the loop.
pub(crate) fn has_to_be_escaped(text: &[u8]) -> bool {
    let next = text.get(1..).unwrap_or_default();
    let after_next = text.get(2..).unwrap_or_default();
    let characters = text.iter().zip(next).zip(after_next);
    characters.fold(false, |found, ((first, second), third)| {
        found
            | (*first < b' ')
            | (*first == 0x7f)
            | ((*first == 0xc2) & (*second < 0xa0))
            | ((*first == 0xd8) & (*second == 0x9c))
            | ((*first == 0xe2)
                & (((*second == 0x80)
                    & ((*third & 0xfe == 0x8e) | ((*third >= 0xa8) & (*third <= 0xae))))
                    | ((*second == 0x81) & (*third >= 0xa6) & (*third <= 0xa9))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_characters_are_judged_alike() {
        for character in '\0'..=char::MAX {
            let text = format!("{character}\"}}");
            let found = has_to_be_escaped(text.as_bytes());
            assert_eq!(found, needs_escape(character), "{character:?}");
        }
    }
}
