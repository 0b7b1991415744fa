"""From ids to ids: settings, the token loop, beams, chat."""
