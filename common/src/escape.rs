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
